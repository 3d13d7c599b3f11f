"""Heads: features to Gaussians (or what a rival has in their place), and these to HR pixels."""
