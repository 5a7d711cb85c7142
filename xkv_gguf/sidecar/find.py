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
    """Folder for sidecars that were made on first use: the user's cache folder / xkv-gguf.

    Raises
    ------
    SidecarError
        The user has no home folder, and no variable names a cache folder.
    """
    name = {"win32": "LOCALAPPDATA", "darwin": ""}.get(sys.platform, "XDG_CACHE_HOME")
    base = os.environ.get(name) if name else None
    if base:
        return Path(base) / "xkv-gguf"
    try:
        home = Path.home()
    except RuntimeError as err:  # no variable, and no entry in the system's list of users
        raise SidecarError(
            f"no folder for sidecars: the user has no home folder; set {name or 'HOME'}, or make a sidecar beside the "
            "model with `xkv-gguf convert MODEL`"
        ) from err
    inside = {"win32": home / "AppData" / "Local", "darwin": home / "Library" / "Caches"}
    return inside.get(sys.platform, home / ".cache") / "xkv-gguf"


def cached_sidecar(model: str | Path) -> Path:
    """Where a model's sidecar is kept in the cache folder: a copy or a rename of the model finds it, too.

    Raises
    ------
    SidecarError
        There is no cache folder.
    ModelError
        The model cannot be read.
    """
    # with the version, so that an update makes a new one instead of stumbling over the old
    return cache_folder() / f"{model_fingerprint(model)}-v{FORMAT_VERSION}{SUFFIX}"


def find_sidecar(model: str | Path) -> Path | None:
    """The sidecar of a model: beside it, or beside the file that it links to, or in the cache folder. It is not opened.

    Raises
    ------
    ModelError
        The model cannot be read.
    """
    for path in (sidecar_beside(model), sidecar_beside(Path(model).resolve())):
        if path.exists():
            return path
    try:
        cached = cached_sidecar(model)
        return cached if cached.exists() else None
    except (SidecarError, PermissionError):  # a folder that is not there, or not the user's, holds nothing
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
