"""Tiny models of all architectures, made when they are asked for: together they take a gigabyte."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAM = "xkv-tiny-archs"


def run_program(repo_root: Path, folder: Path, *archs: str) -> list[str]:
    """Names of the models that were made, of the architectures given or of all."""
    found = [path for path in repo_root.glob(f"build/*/tests/{PROGRAM}") if path.is_file()]
    if not found:
        pytest.skip(f"{PROGRAM} is not built: make test, or cmake --build build/<tag> --target xkv-tests")
    done = subprocess.run([str(found[0]), str(folder), *archs], capture_output=True, text=True, check=True)
    return [Path(line.split()[1]).stem for line in done.stdout.splitlines() if line.startswith("made ")]


@pytest.fixture
def arch(repo_root: Path, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Get the model of a name in the table; it is gone after the test."""
    made: list[Path] = []

    def get(name: str) -> Path:
        path = tmp_path / f"{name}.gguf"
        run_program(repo_root, tmp_path, name.removesuffix("-moe"), name)
        made.extend(tmp_path.glob("*.gguf"))
        assert path.is_file()
        return path

    yield get
    for path in made:
        path.unlink(missing_ok=True)
