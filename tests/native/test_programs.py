"""Runs the programs of native/cmake/tests.cmake, which `make test` builds."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Tiny


def run(repo_root: Path, name: str, *arguments: str) -> None:
    found = [path for path in repo_root.glob(f"build/*/tests/{name}*") if path.name in (name, f"{name}.exe")]
    if not found:
        pytest.skip(f"{name} is not built: make test, or cmake --build build/<tag> --target xkv-tests")
    done = subprocess.run([str(found[0]), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.parametrize("name", ["xkv-test-select", "xkv-test-attn", "xkv-test-shim-metal"])
def test_program(name: str, repo_root: Path) -> None:
    run(repo_root, name)


@pytest.mark.parametrize("arguments", [["xkv-test-attn-cuda", "all", "5"], ["xkv-test-attn-metal", "5"]])
def test_kernels_in_a_shim(arguments: list[str], repo_root: Path) -> None:
    """All planted faults, and one case of five; `make test-kernels` runs all."""
    run(repo_root, *arguments)


def test_the_program_for_devices(repo_root: Path) -> None:
    run(repo_root, "xkv-test-attn-device", "CPU")


def test_some_layers(repo_root: Path, tiny: Callable[[str], Tiny]) -> None:
    """Groups of layers that do not follow each other and are not all; and files that several threads read."""
    one = tiny("llama")
    run(repo_root, "xkv-test-layers", str(one.path), str(one.bases().path))
