"""Runs the programs of native/cmake/tests.cmake, which `make test` builds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["xkv-test-select", "xkv-test-attn"])
def test_program(name: str, repo_root: Path) -> None:
    found = [path for path in repo_root.glob(f"build/*/tests/{name}*") if path.suffix in ("", ".exe")]
    if not found:
        pytest.skip(f"{name} is not built: make test, or cmake --build build/<tag> --target xkv-tests")
    done = subprocess.run([str(found[0])], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
