"""What a training step is made of: micro-batches, optimizer, metrics, the frozen reference, the Trainer's hardware."""
