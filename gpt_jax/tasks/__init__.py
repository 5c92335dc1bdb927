"""Labelled tasks: their registry and readers, the input transformations of Figure 1, heads and scoring, zero-shot probes."""
