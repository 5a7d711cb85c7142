"""Runs the programs of native/cmake/tests.cmake, which `make test` builds."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Tiny

Run = Callable[..., str]


@pytest.fixture
def run(repo_root: Path, request: pytest.FixtureRequest) -> Run:
    """Run a program, which has to say nothing of errors; returns what it prints."""
    folder = request.config.getoption("--programs")

    def run(name: str, *arguments: str | Path) -> str:
        found = [path for path in repo_root.glob(f"{folder}/{name}*") if path.name in (name, f"{name}.exe")]
        if not found:
            pytest.skip(f"{name} is not built: make test, or cmake --build build/<tag> --target xkv-tests")
        done = subprocess.run([str(found[0]), *map(str, arguments)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        return done.stdout

    return run


@pytest.mark.parametrize("name", ["xkv-test-select", "xkv-test-attn", "xkv-test-shim-metal"])
def test_program(name: str, run: Run) -> None:
    run(name)


@pytest.mark.parametrize("arguments", [["xkv-test-attn-cuda", "cases", "10"], ["xkv-test-attn-metal", "10"]])
def test_kernels_in_a_shim(arguments: list[str], run: Run) -> None:
    """One case of ten; `make test-kernels` runs all, and the faults that are planted in kernels for CUDA."""
    run(*arguments)


def test_the_program_for_devices(run: Run) -> None:
    run("xkv-test-attn-device", "CPU")


def test_some_layers(run: Run, tiny: Callable[[str], Tiny]) -> None:
    """Groups of layers that do not follow each other and are not all; and files that several threads read."""
    one = tiny("llama")
    run("xkv-test-layers", one.path, one.bases().path)


def test_two_threads(run: Run, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    one = tiny("llama")
    run("xkv-test-threads", one.path, one.bases(4, 32).path, tmp_path)


@pytest.mark.slow
def test_calls_that_fail(run: Run, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Of each operation and kind of call ten: `make test-faults` takes all."""
    one = tiny("llama")
    run("xkv-test-faults", one.path, one.bases(4, 32).path, tmp_path, "10")


def test_damaged_sidecars(run: Run, tiny: Callable[[str], Tiny]) -> None:
    """Some of what `make fuzz` tries."""
    assert "taken, the rest refused" in run("xkv-fuzz-sidecar", tiny("llama").bases(4, 32).path, "5000", "1")


def test_damaged_states(run: Run, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    one = tiny("llama")
    assert "taken, the rest" in run("xkv-fuzz-state", one.path, one.bases(4, 32).path, tmp_path, "2000", "1")
