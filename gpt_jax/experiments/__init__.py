"""What tells a story with the parts below: the demo, the paper's analyses, benchmarks, tables and figures."""
