"""What the model learns to do, one module a task."""
