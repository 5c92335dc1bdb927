"""Labeled tasks: registry, readers, input transformations of Figure 1, heads, metrics, fine-tuning, and zero-shot probes."""
