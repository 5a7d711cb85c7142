"""A small stand-in for the pinned sdist, to test fetching, patching and refreshing without the network."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

MEMORY_H = "".join(f"# line {number}\n" for number in range(1, 21))


@pytest.fixture(scope="session")
def upstream() -> ModuleType:
    """The module native/cmake/upstream.py."""
    sys.path.insert(0, str(ROOT / "native" / "cmake"))
    try:
        import upstream
    finally:
        sys.path.pop(0)
    return upstream


@pytest.fixture(scope="session")
def refresh(upstream: ModuleType) -> ModuleType:
    """The module native/cmake/refresh.py."""
    sys.path.insert(0, str(ROOT / "native" / "cmake"))
    try:
        import refresh
    finally:
        sys.path.pop(0)
    return refresh


def put_sdist(root: Path, memory_h: str = MEMORY_H) -> None:
    """Write an sdist with three files into root/.cache, and the pin that names it."""
    (root / ".cache").mkdir(exist_ok=True)
    archive = root / ".cache" / "llama_cpp_python-9.9.9.tar.gz"
    files = {
        "README.md": "not llama.cpp",
        "vendor/llama.cpp/src/llama-memory.h": memory_h,
        "vendor/llama.cpp/src/other.h": "other\n",
        "vendor/llama.cpp/docs/large.md": "skipped\n",
    }
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"llama_cpp_python-9.9.9/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    pin = {"package": "llama-cpp-python", "version": "9.9.9", "sha256": digest}
    (root / "upstream.json").write_text(json.dumps(pin))


def patch_text(before: str, number: int, text: str) -> str:
    """Unified diff that replaces one line of llama-memory.h."""
    lines = before.splitlines()
    name = "src/llama-memory.h"
    return (
        f"What the patch does.\n\ndiff --git a/{name} b/{name}\n--- a/{name}\n+++ b/{name}\n"
        f"@@ -{number - 1},3 +{number - 1},3 @@\n {lines[number - 2]}\n-{lines[number - 1]}\n+{text}\n {lines[number]}\n"
    )


@pytest.fixture
def write_pin() -> Callable[[Path, str], None]:
    """Replaces a project's sdist and pin by one with another llama-memory.h."""
    return put_sdist


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a pin, and two patches that change the lines 5 and 15."""
    put_sdist(tmp_path)
    patches = tmp_path / "native" / "patches"
    patches.mkdir(parents=True)
    (patches / "0001-five.patch").write_text(patch_text(MEMORY_H, 5, "FIVE"))
    (patches / "0002-fifteen.patch").write_text(patch_text(MEMORY_H, 15, "FIFTEEN"))
    return tmp_path
