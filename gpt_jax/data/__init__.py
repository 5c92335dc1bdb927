"""Text, tokens and batches as NumPy arrays. This package does not import JAX."""
