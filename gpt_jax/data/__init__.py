"""Text, tokens and batches. Knows nothing of JAX; numpy arrays leave it."""
