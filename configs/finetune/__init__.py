"""Fine-tuning configs: one for each of the paper's tasks, with its settings."""
