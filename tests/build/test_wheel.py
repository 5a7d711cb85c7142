"""What the installed package holds."""

from __future__ import annotations

import json
import re
from importlib.metadata import distribution
from pathlib import Path, PurePosixPath

from xkv_gguf.runtime import loader


def installed_files() -> list[PurePosixPath]:
    files = distribution("xkv-gguf").files
    assert files
    return [PurePosixPath(path) for path in files]


def test_only_one_name_in_site_packages() -> None:
    tops = {path.parts[0] for path in installed_files() if path.parts[0] != ".."}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"xkv_gguf"}
    assert PurePosixPath("xkv_gguf/convert/__init__.py") in installed_files()


def test_one_copy_of_each_library() -> None:
    names = sorted(path.name for path in installed_files() if path.parts[:2] == ("xkv_gguf", "lib"))
    stems = {name.partition(".")[0] for name in names}
    assert {"libllama", "libggml", "libggml-base", "libggml-cpu"} <= stems
    assert len(stems) == len(names), names


def test_no_upstream_headers_or_cmake_files() -> None:
    names = [str(path) for path in installed_files()]
    assert not [name for name in names if name.endswith((".cmake", ".pc", "llama.h", "ggml.h"))]


def test_header_has_the_declarations_for_cffi() -> None:
    text = loader.HEADER.read_text()
    block = re.search(r"// CFFI-BEGIN\n(.*)// CFFI-END", text, re.DOTALL)
    assert block is not None
    assert "xkv_build_id" in block[1]
    assert not re.search(r"^\s*#", block[1], re.MULTILINE)


def test_upstream_converter_with_its_licence() -> None:
    folder = loader.PACKAGE_DIR / "_upstream"
    assert (folder / "convert_hf_to_gguf.py").is_file()
    assert (folder / "conversion" / "__init__.py").is_file()
    assert (folder / "gguf-py" / "gguf" / "__init__.py").is_file()
    assert "MIT License" in (folder / "LICENSE").read_text()


def test_dependency_is_the_pinned_version(repo_root: Path) -> None:
    pin = json.loads((repo_root / "upstream.json").read_text())
    assert f"{pin['package']}=={pin['version']}" in (distribution("xkv-gguf").requires or [])
