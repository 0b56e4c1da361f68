"""The coordinator: the round loop, its history, and the commands that read it."""
