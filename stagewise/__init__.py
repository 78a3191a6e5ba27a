"""Plumbing of the training scripts. Nothing here imports from the repository's root or decides what
trains."""
