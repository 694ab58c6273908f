"""Where metier keeps what it can make again: ``METIER_CACHE``, else the user's cache folder, else a temporary one."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """An existing, writable folder."""
    given = os.environ.get("METIER_CACHE")
    candidates = [Path(given)] if given else [_user_cache(), Path(tempfile.gettempdir()) / "metier-cache"]
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="metier-cache-"))


def _user_cache() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("metier")
