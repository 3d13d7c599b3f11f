"""Training and evaluation data: patches, degradations, benchmark folders, tiles, downloads."""
