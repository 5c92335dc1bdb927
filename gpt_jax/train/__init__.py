"""The training step, optimizer, training loop and checkpoints. Nothing here depends on a particular task."""
