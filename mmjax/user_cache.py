"""Where mmjax keeps what can be made again: compiled programs, indexes, fetched pictures."""

import os
from pathlib import Path


def folder(*names: str) -> Path:
    """Return a folder of the user's cache, $XDG_CACHE_HOME/mmjax or ~/.cache/mmjax, made or not."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "mmjax", *names)
