"""Benchmarks (`gpt-jax bench`): programs, ours and peers, that run in processes of their own and are timed in alternation."""
