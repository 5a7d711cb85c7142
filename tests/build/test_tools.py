"""A missing tool gives one line that names it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = {"python3": "python3", "git": "git", "cc": "C", "c++": "C++"}


def fake(folder: Path, name: str, script: str = "exit 0") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def check(repo_root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    shell = shutil.which("sh")
    assert shell is not None
    env = {"PATH": str(folder), "PYTHON": "python3", "VENV": str(folder / "no-venv")}
    script = repo_root / "native" / "cmake" / "check-tools.sh"
    return subprocess.run([shell, str(script)], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in TOOLS:
        fake(tmp_path, name)
    return tmp_path


def test_all_tools(repo_root: Path, folder: Path) -> None:
    done = check(repo_root, folder)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", TOOLS)
def test_missing_tool(repo_root: Path, folder: Path, name: str) -> None:
    os.unlink(folder / name)
    done = check(repo_root, folder)
    assert done.returncode == 1
    assert done.stderr.startswith(f"missing: {TOOLS[name]} (") or done.stderr.startswith(f"missing: a {TOOLS[name]} ")
    assert len(done.stderr.splitlines()) == 1


def test_other_compilers_do(repo_root: Path, folder: Path) -> None:
    for name, other in (("cc", "clang"), ("c++", "clang++")):
        os.rename(folder / name, folder / other)
    assert check(repo_root, folder).returncode == 0


@pytest.mark.parametrize(
    ("word", "expected"),
    [("version_info", "Python 3.10 or newer (python3 is Python 3.9.2)"), ("ensurepip", "Python's venv module")],
)
def test_python_that_will_not_do(repo_root: Path, folder: Path, word: str, expected: str) -> None:
    fake(folder, "python3", f'case "$*" in -V) echo Python 3.9.2;; *{word}*) exit 1;; esac')
    done = check(repo_root, folder)
    assert done.returncode == 1
    assert done.stderr.startswith(f"missing: {expected}")
    assert len(done.stderr.splitlines()) == 1
