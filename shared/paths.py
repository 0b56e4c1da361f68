"""Where Moonflower keeps things unless told otherwise."""

import os
from pathlib import Path


def home() -> Path:
    """Give Moonflower's folder: MOONFLOWER_HOME, or ``.moonflower`` in the user's own. It may not exist."""
    named = os.environ.get("MOONFLOWER_HOME")
    return Path(named).expanduser() if named else Path.home() / ".moonflower"


def default_database() -> str:
    """Give the URL of the history: MOONFLOWER_DATABASE, or the SQLite file ``history.db`` in `home`."""
    return os.environ.get("MOONFLOWER_DATABASE") or f"sqlite:///{home().absolute() / 'history.db'}"
