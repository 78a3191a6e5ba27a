"""Infrastructure for the training scripts.

This package does not import from the repository root and contains no training methods.
"""
