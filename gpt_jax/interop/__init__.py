"""Other formats in and out: weights, graphs, tokenizers, and the proof that they compute the same."""
