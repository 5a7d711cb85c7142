"""What a run that was interrupted had done: a file beside its result, so that the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .files import write_atomic

VERSION = 2


class Partial:
    """Finished parts of plain values, each by everything that it depends on, in a file beside the result.

    Parameters
    ----------
    out : Path or None
        The result's path; the file is OUT.partial. What it holds is read at once. None keeps parts in memory only.
    verb : str
        Whose parts they are.
    basis : mapping
        Plain values by name that all parts depend on.
    mixed : bool
        Whether the file may hold parts of another basis, which `remove` deletes, too.

    Attributes
    ----------
    path : Path or None
    n_taken, n_put : int
        Parts that `get` found and that `put` kept.

    Raises
    ------
    OptionError
        A file of that name is something else, cannot be read, or has another basis though it may not.
    """

    def __init__(
        self, out: Path | None, verb: str, basis: Mapping[str, Any] | None = None, *, mixed: bool = True
    ) -> None:
        self.path = out.with_name(f"{out.name}.partial") if out is not None else None
        self.n_taken = self.n_put = 0
        self._basis = dict(basis or {})
        self._head = {"format": f"xkv-gguf {verb}, partial, {VERSION}", "basis": self._key({})}
        self._parts: dict[str, Any] = self._read(self.path, mixed) if self.path is not None else {}

    def get(self, **what: Any) -> Any:
        """The finished part that depends on these values, in any order; None if there is none."""
        part = self._parts.get(self._key(what))
        self.n_taken += part is not None
        return part

    def put(self, part: Any, **what: Any) -> None:
        """Keep a part; the file holds it when this returns."""
        self._parts[self._key(what)] = part
        self.n_put += 1
        if self.path is not None:
            write_atomic(self.path, json.dumps({**self._head, "parts": self._parts}) + "\n")

    def remove(self) -> None:
        """Delete the file: the result has all parts."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _key(self, what: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps({**self._basis, **what}, sort_keys=True).encode()).hexdigest()

    def _read(self, path: Path, mixed: bool) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OptionError(f"{path}: cannot be read ({error.strerror or error}); remove it") from error
        except ValueError:
            found = None
        expected = self._head["format"]
        if not isinstance(found, dict) or found.get("format") != expected:
            name = found.get("format") if isinstance(found, dict) else None
            raise OptionError(f"{path}: has format {name!r}, expected {expected!r}; remove it to start anew")
        if not mixed and found.get("basis") != self._head["basis"]:
            raise OptionError(f"{path}: holds parts of another model or with other settings; remove it to start anew")
        return dict(found["parts"])


def file_identity(path: Path) -> list[Any]:
    """What tells a file from another one, without its content: path, size, and time of change."""
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]
