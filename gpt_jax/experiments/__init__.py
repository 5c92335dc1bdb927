"""Programs that use all other parts: the demo, the paper's analyses, benchmarks, score tables and plots."""
