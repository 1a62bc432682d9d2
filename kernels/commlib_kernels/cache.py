"""Where compiled kernels are kept."""

import os
import tempfile
from functools import cache
from pathlib import Path


@cache
def folder(name: str) -> Path:
    """The folder `name` in ``$COMMLIB_CACHE``, else in ``~/.cache/commlib``; made if missing.

    Where neither can be written (read-only home) one in the temporary directory is used. Ranks may
    fill it at the same time: whoever writes a file writes it under another name and renames it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    places = [os.environ.get("COMMLIB_CACHE"), f"{home}/commlib"]
    places.append(str(Path(tempfile.gettempdir()) / f"commlib-{os.getuid()}"))
    for place in places:
        if place and _writable(path := Path(place).expanduser() / name):
            return path
    return Path(tempfile.mkdtemp(prefix="commlib-"))


def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return os.access(path, os.W_OK)
    except OSError:
        return False
