"""The sources of kernels for Metal: one text of them, and what no compiler here tells of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SPACES = {"device", "constant", "threadgroup", "thread", "XKV_THREAD"}
POINTER = re.compile(
    r"((?:\w+\s+)*)\b(float[24]?|u?int|uint64_t|int32_t|half|u?char|T|xkv_mtl_\w+)((?:\s+const)?)\s+[*&]\s*\(?\w"
)
CLANGS = ("clang++", *(f"clang++-{version}" for version in range(22, 14, -1)))


@pytest.fixture(scope="module")
def metal(repo_root: Path) -> ModuleType:
    """The module native/cmake/metal.py."""
    sys.path.insert(0, str(repo_root / "native" / "cmake"))
    try:
        import metal
    finally:
        sys.path.pop(0)
    return metal


def sources(repo_root: Path) -> list[Path]:
    folder = repo_root / "native" / "ops" / "xkv_attn" / "metal"
    host = {"xkv-mtl-op.h", "xkv-mtl-plan.h", "xkv-attn-metal.h"}
    return [path for path in sorted((*folder.glob("*.metal"), *folder.glob("*.h"))) if path.name not in host]


def without_space(text: str) -> list[str]:
    """Pointers and references whose address space is not named, which Metal refuses."""
    text = re.sub(r"//[^\n]*", "", text)
    return [match[0] for match in POINTER.finditer(text) if not SPACES & set(match[1].split())]


def test_every_pointer_names_its_address_space(repo_root: Path) -> None:
    assert {path.name: without_space(path.read_text()) for path in sources(repo_root)} == {
        path.name: [] for path in sources(repo_root)
    }


@pytest.mark.parametrize(
    "text",
    ["static float f(const float * x)", "float4 * p = q;", "void f(thread int * a, xkv_mtl_in & in)", "T * res = at;"],
)
def test_one_that_does_not_is_found(text: str) -> None:
    assert len(without_space(text)) == 1


@pytest.mark.parametrize(
    "text", ["f(thread const xkv_mtl_in & in)", "device float * x", "a = b * c;", "n & m", "(device const uint *) p"]
)
def test_others_are_not(text: str) -> None:
    assert without_space(text) == []


def test_one_text_has_each_file_once(metal: ModuleType, repo_root: Path, tmp_path: Path) -> None:
    text = metal.flatten(repo_root / "native" / "ops" / "xkv_attn" / "metal" / "xkv-attn.metal")
    assert "#pragma once" not in text
    assert re.findall(r"#\s*include\s+(\S+)", text) == ["<metal_stdlib>", "<stdint.h>"]
    kernels = re.findall(r"^kernel void (\w+)\(XKV_MTL_PARAMS\)", text, re.MULTILINE)
    assert len(kernels) == len(set(kernels)) == 11
    for path in sources(repo_root):
        head = path.read_text().splitlines()[0]
        assert text.count(head) == 1, path.name


def test_a_text_that_did_not_change_keeps_its_time(
    metal: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.metal").write_text('#include "b.h"\n#include "b.h"\nint a;\n')
    (tmp_path / "b.h").write_text("#pragma once\nint b;\n")
    out = tmp_path / "out.metal"
    monkeypatch.setattr(sys, "argv", ["metal.py", str(tmp_path / "a.metal"), str(out)])
    metal.main()
    assert out.read_text() == "int b;\nint a;\n"
    before = out.stat().st_mtime_ns
    metal.main()
    assert out.stat().st_mtime_ns == before


def syntax(compiler: str, text: str, repo_root: Path, tmp_path: Path, *options: str) -> str:
    """What a compiler says of kernels in the shim's language."""
    file = tmp_path / "kernels.cpp"
    file.write_text(text)
    shim = repo_root / "tests" / "shims" / "metal"
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wno-unused-function", "-I", str(shim), *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_one_text_compiles(metal: ModuleType, repo_root: Path, tmp_path: Path) -> None:
    text = metal.flatten(repo_root / "native" / "ops" / "xkv_attn" / "metal" / "xkv-attn.metal")
    assert syntax("g++", text, repo_root, tmp_path, "-Wall", "-Wno-attributes") == ""


def test_address_spaces_are_kept_apart(metal: ModuleType, repo_root: Path, tmp_path: Path) -> None:
    """By clang, which knows address spaces."""
    compiler = next(filter(None, map(shutil.which, CLANGS)), None)
    if compiler is None or syntax(compiler, "typedef _Float16 half;", repo_root, tmp_path):
        pytest.skip("no clang++ that has _Float16 here, as version 15 does")
    text = metal.flatten(repo_root / "native" / "ops" / "xkv_attn" / "metal" / "xkv-attn.metal")
    assert syntax(compiler, text, repo_root, tmp_path, "-DXKV_SHIM_SPACES") == ""
    wrong = text.replace("threadgroup const float * y, int ldy", "device const float * y, int ldy", 1)
    assert wrong != text
    assert "error" in syntax(compiler, wrong, repo_root, tmp_path, "-DXKV_SHIM_SPACES")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_no_name_is_that_of_upstreams_kernels(metal: ModuleType, repo_root: Path, tmp_path: Path) -> None:
    """ggml-metal puts its own header before each source that it embeds."""
    found = sorted(repo_root.glob("build/*/upstream/llama.cpp/ggml/src/ggml-metal"))
    if not found:
        pytest.skip("llama.cpp is not unpacked: make build")
    head = (found[0] / "kernels" / "common.h").read_text()
    head = head.replace('#include "ggml-metal-impl.h"', (found[0] / "ggml-metal-impl.h").read_text())
    text = metal.flatten(repo_root / "native" / "ops" / "xkv_attn" / "metal" / "xkv-attn.metal")
    both = f"#include <stddef.h>\n#include <stdint.h>\n{head.replace('#pragma once', '')}\n{text}"
    assert syntax("g++", both, repo_root, tmp_path, "-Wall", "-Wno-unused-variable") == ""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    "name", ["ggml-metal-ops.cpp", "ggml-metal-device.cpp", "ggml-metal.cpp", "xkv-attn-metal.cpp"]
)
def test_what_is_cpp_of_the_backend_is_sound(name: str, repo_root: Path) -> None:
    """With the lines of our patch; its Objective-C needs a Mac."""
    found = sorted(repo_root.glob("build/*/upstream/llama.cpp/ggml"))
    if not found:
        pytest.skip("llama.cpp is not unpacked: make build")
    ours = repo_root / "native" / "ops" / "xkv_attn" / "metal"
    file = ours / name if name.startswith("xkv") else found[0] / "src" / "ggml-metal" / name
    command = ["g++", "-std=c++17", "-fsyntax-only", "-include", "memory"]
    command += [option for folder in (found[0] / "include", found[0] / "src", ours) for option in ("-I", str(folder))]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
