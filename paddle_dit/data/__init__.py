"""Latents on disk, and the order in which training sees them. NumPy only."""
