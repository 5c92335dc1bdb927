"""Programs that use all other packages: the demo, the paper's analyses, benchmarks, score tables and plots."""
