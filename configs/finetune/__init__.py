"""Configs for fine-tuning: one for each task of the paper, with the paper's settings, and one for a task of your own."""
