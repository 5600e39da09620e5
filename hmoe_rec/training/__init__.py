"""8. The loop, its optimizers, its checkpoints."""
