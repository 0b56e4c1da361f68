"""The coordinator's daemon: what it supervises, the run queue, and its settings."""
