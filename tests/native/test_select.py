"""Runs select.cpp, which `make test` builds: which tokens leave the window, and the tables of chunks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def test_select(repo_root: Path) -> None:
    found = [path for path in repo_root.glob("build/*/tests/xkv-tests*") if path.suffix in ("", ".exe")]
    if not found:
        pytest.skip("xkv-tests is not built: make test, or cmake --build build/<tag> --target xkv-tests")
    done = subprocess.run([str(found[0])], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
