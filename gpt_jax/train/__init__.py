"""Optimizer, update, loop and checkpoints. Knows no tasks."""
