"""The coordinator's control API: the service, who may call it, and the commands that do."""
