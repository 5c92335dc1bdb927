"""Labeled tasks: registry, readers, the input transformations of Figure 1, heads, metrics, fine-tuning, and zero-shot probes."""
