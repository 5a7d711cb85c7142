"""llama.cpp calls the overrides of a cache from C, which no exception may pass."""

from __future__ import annotations

import re
from pathlib import Path

OVERRIDE = re.compile(r"^\s*(?P<front>.*?)\b(?P<name>\w+)\s*\([^;{]*\)(?P<back>[^;{]*)\boverride\b", re.MULTILINE)
MAY_THROW = {"state_write", "state_read"}
"""llama.cpp catches what these throw."""


def not_closed(header: str) -> list[str]:
    """Overrides that are not noexcept."""
    return [
        found["name"]
        for found in OVERRIDE.finditer(header)
        if "noexcept" not in found["back"] and found["name"] not in MAY_THROW
    ]


def test_no_exception_leaves_an_override(repo_root: Path) -> None:
    text = (repo_root / "native" / "cache" / "xkv-cache.h").read_text()
    assert len(list(OVERRIDE.finditer(text))) == 17
    assert not_closed(text) == ["as_xkv"]


def test_an_open_override_is_found() -> None:
    assert not_closed("    void clear(bool data) override;\n    bool apply() noexcept override;\n") == ["clear"]
