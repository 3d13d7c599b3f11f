"""Image files in and out, and the paths that users name."""
