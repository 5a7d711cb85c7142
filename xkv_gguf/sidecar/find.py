"""Where a model's sidecar lies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..base.files import check_writable
from ..errors import OptionError, SidecarError
from ..model.fingerprint import model_fingerprint
from .info import FORMAT_VERSION, SUFFIX, sidecar_beside
from .read import is_sidecar, read_sidecar


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


def check_output(out: Path, model: Path, force: bool = False) -> None:
    """Refuse to write a sidecar over a file that it must not replace, before work is done for it.

    Parameters
    ----------
    out : Path
        Where the sidecar is to be written.
    model : Path
        The model that it is made for. Its own sidecar, and one that cannot be used any more, may be replaced.
    force : bool
        Replace the sidecar of another model, too.

    Raises
    ------
    OptionError
        `out` cannot be written to, or is the model, something else than a sidecar, or another model's sidecar.
    ModelError
        The model cannot be read.
    """
    check_writable(out)
    if not os.path.lexists(out):
        return
    if out.exists() and out.samefile(model):
        raise OptionError(f"output {out}: is the model itself; name another file")
    if not is_sidecar(out):
        raise OptionError(f"output {out}: exists and is no xkv sidecar, so it is not replaced; name another file")
    if force:
        return
    try:
        made_for = read_sidecar(out).info
    except SidecarError:
        return  # of another version, or damaged: to make it again is the remedy
    if made_for.fingerprint != model_fingerprint(model):
        raise OptionError(
            f"output {out}: is the sidecar of another model ({made_for.architecture} {made_for.name!r}); "
            "name another file, or use --force to replace it"
        )
