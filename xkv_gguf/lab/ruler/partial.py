"""Finished samples of a run that has not ended: a file beside the result, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import OptionError

Key = tuple[str, str, int, int]
"""Cache, task, length, index."""


def key_of(record: Mapping[str, Any]) -> Key:
    """Which sample on which cache a record is of."""
    return record["cache"], record["task"], record["length"], record["index"]


class Partial:
    """Records by key, written as they come.

    The first line says what all records depend on; samples are taken up only where it is the same.

    Parameters
    ----------
    path : Path or None
        None keeps the records in memory only.
    basis : mapping
        Plain values that the records depend on: model, build, settings.

    Raises
    ------
    OptionError
        The file cannot be read, is no such file, or has another basis.
    """

    def __init__(self, path: Path | None, basis: Mapping[str, Any]) -> None:
        self.path = path
        self._head = json.dumps({"ruler": dict(basis)}, sort_keys=True)
        self.records: dict[Key, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record."""
        if self.path is not None:
            lines = [json.dumps(record)] if self.records else [self._head, json.dumps(record)]
            with self.path.open("a" if self.records else "w", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))
        self.records[key_of(record)] = record

    def remove(self) -> None:
        """Delete the file: the result holds everything."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        try:
            head, *lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"{path}: cannot be read ({error})") from error
        if head != self._head and (head or lines):
            raise OptionError(f"{path}: holds samples of another model or with other settings; delete it to start anew")
        whole = lines[:-1]  # what follows the last newline is empty, or a record that was cut off
        try:
            self.records = {key_of(record): record for record in map(json.loads, whole)}
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{path}: is damaged; delete it to start anew") from error
        if lines and lines[-1]:
            path.write_text("".join(line + "\n" for line in (head, *whole)), encoding="utf-8")
