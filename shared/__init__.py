"""What the coordinator and the sites agree on."""

__version__ = "0.1.0"
