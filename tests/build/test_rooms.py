"""The rooms of native/ include one way only."""

from __future__ import annotations

import re
from pathlib import Path

BELOW = {
    "base": set[str](),
    "format": {"base"},
    "store": {"base", "format", "ops"},
    "window": {"base", "format"},
    "flow": {"base", "format", "store", "window"},
    "attn": {"base", "format", "store", "window", "ops"},
    "cache": {"base", "format", "store", "window", "flow", "attn", "ops"},
    "api": {"base", "format", "store", "window", "flow", "attn", "cache"},
    "ops": set[str](),
}


def wrong(native: Path) -> list[str]:
    """Includes of a room that is not below."""
    found = []
    for path in sorted(p for room in BELOW for p in (native / room).rglob("*.*")):
        for room in re.findall(r'^\s*#\s*include\s+"(\w+)/', path.read_text(), re.MULTILINE):
            here = path.relative_to(native).parts[0]
            if room not in BELOW[here] | {here}:
                found.append(f"{here}/{path.name} includes {room}/")
    return found


def test_rooms(repo_root: Path) -> None:
    native = repo_root / "native"
    assert all(any((native / room).rglob("*.cpp")) for room in BELOW)
    assert wrong(native) == []


def test_what_goes_back_is_found(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a.h").write_text('#include "base/b.h"\n#include "cache/c.h"\n')
    assert wrong(tmp_path) == ["store/a.h includes cache/"]
