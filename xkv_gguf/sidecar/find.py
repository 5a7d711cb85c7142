"""Where a model's sidecar lies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..model.fingerprint import model_fingerprint
from .info import FORMAT_VERSION, SUFFIX, sidecar_beside


def cache_folder() -> Path:
    """Folder for sidecars that were made on first use: the user's cache folder / xkv-gguf."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "xkv-gguf"


def cached_sidecar(model: str | Path) -> Path:
    """Where a model's sidecar is kept in the cache folder: a copy or a rename of the model finds it, too.

    Raises
    ------
    ModelError
        The model cannot be read.
    """
    # with the version, so that an update makes a new one instead of stumbling over the old
    return cache_folder() / f"{model_fingerprint(model)}-v{FORMAT_VERSION}{SUFFIX}"


def find_sidecar(model: str | Path) -> Path | None:
    """The sidecar of a model: beside it, else in the cache folder, else None. It is not opened.

    Raises
    ------
    ModelError
        The model cannot be read.
    """
    for path in (sidecar_beside(model), cached_sidecar(model)):
        if path.exists():
            return path
    return None
