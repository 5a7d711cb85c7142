"""What a run that was interrupted had done: a file beside its result, so that the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ._files import write_atomic
from .errors import OptionError


def part_key(**what: Any) -> str:
    """A hash of everything that a part depends on: plain values by name; the same for equal ones in any order."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class Partial:
    """Finished parts by `part_key`, in a file beside the result.

    Parameters
    ----------
    out : Path
        The result's path; the file is OUT.partial. What it holds is read at once.
    verb : str
        Whose parts they are.

    Raises
    ------
    OptionError
        A file of that name is something else.
    """

    def __init__(self, out: Path, verb: str) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._format = f"xkv-gguf {verb}, partial, 2"
        self._parts: dict[str, Any] = {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["format"] != self._format:
                raise ValueError(found["format"])
            self._parts = dict(found["parts"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"{self.path}: does not hold what an interrupted run of {verb} has done; remove it, or choose another "
                "name for the result"
            ) from error

    def get(self, key: str) -> Any:
        """The finished part of a key, None if there is none."""
        return self._parts.get(key)

    def put(self, key: str, part: Any) -> None:
        """Keep a part, of plain values; the file holds it when this returns."""
        self._parts[key] = part
        write_atomic(self.path, json.dumps({"format": self._format, "parts": self._parts}) + "\n")

    def __len__(self) -> int:
        return len(self._parts)

    def remove(self) -> None:
        """Delete the file: the result has all parts."""
        self.path.unlink(missing_ok=True)


@contextmanager
def resumable(partial: Partial, say: bool) -> Iterator[None]:
    """Tell on stderr where an interrupted run goes on from, if it has done anything and `say` is true."""
    try:
        yield
    except KeyboardInterrupt:
        if say and len(partial):
            print(f"\n{partial.path} keeps what is done: the same command goes on from there", file=sys.stderr, end="")
        raise
