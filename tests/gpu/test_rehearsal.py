"""What `make test-gpu` and `make bench-gpu` run on a card, in small on the CPU; and that without a card they say so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import folder
from .check import Checks, check_full_rank, check_greedy, check_ratio


@pytest.fixture(scope="session")
def programs(repo_root: Path) -> Path:
    found = [path.parent for path in repo_root.glob("build/*/tests/xkv-gpu-check") if path.is_file()]
    if not found:
        pytest.skip("xkv-gpu-check is not built: make test, or cmake --build build/<tag> --target xkv-tests")
    return found[0]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_checks_pass_on_the_cpu(programs: Path, tmp_path: Path) -> None:
    small = ["--layers", "2", "--threads", "1", "--tokens", "700", "--only", "queries 9"]
    done = run("tests.gpu.check", "--device", "cpu", "--programs", programs, "--results", tmp_path, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "test.json").read_text())
    assert result["failed"] == 0 and len(result["checks"]) >= 14
    cases = json.loads((tmp_path / "op.json").read_text())["cases"]
    assert len(cases) > 20 and all(one["error"] < one["limit"] and not one["refused"] for one in cases)


@pytest.mark.slow
def test_the_measurements_run_on_the_cpu(programs: Path, tmp_path: Path) -> None:
    small = ["--shape", "smollm2-135m", "--layers", "2", "--depths", "768", "--caches", "f16,xkv:7", "--threads", "1"]
    small += ["--reps", "2", "--copy-mib", "4"]
    done = run("tests.gpu.bench", "--device", "cpu", "--programs", programs, "--results", tmp_path, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [row["status"] for row in result["rows"]] == ["ok", "ok"]
    f16, xkv = result["rows"]
    assert all(row[key] > 0 for row in (f16, xkv) for key in ("prompt_tps", "prefill_tps", "decode_tps"))
    assert xkv["report"]["total_bytes"] < f16["report"]["total_bytes"] / 6 and xkv["report"]["n_stored"] > 0
    assert f16["card_bytes"] is None  # there is no driver to ask
    assert len(result["op"]) == 3 and all(row["bytes_per_second"] > 0 for row in result["op"])


def test_what_there_is_no_time_for_is_named(programs: Path, tmp_path: Path) -> None:
    small = ["--shape", "smollm2-135m", "--layers", "1", "--depths", "1024", "--caches", "f16", "--seconds", "0"]
    done = run("tests.gpu.bench", "--device", "cpu", "--programs", programs, "--results", tmp_path, *small)
    assert done.returncode == 0 and "f16 at 1024: out of time" in done.stdout
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [row["status"] for row in (*result["rows"], *result["op"])] == ["out of time"] * 4


def test_a_wrong_device_is_an_error(programs: Path, tmp_path: Path) -> None:
    done = subprocess.run([programs / "xkv-gpu-check", "--device", "none"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    small = ["--shape", "smollm2-135m", "--layers", "1", "--depths", "1024", "--caches", "xkv:1000"]
    done = run("tests.gpu.bench", "--device", "none", "--programs", programs, "--results", tmp_path, *small)
    assert done.returncode == 1 and "failed" in done.stdout


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_without_a_card_make_says_so_and_fails(target: str, repo_root: Path, tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MAKEFLAGS": ""}
    done = subprocess.run(["make", "-s", target], cwd=repo_root, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "no NVIDIA card found" in done.stderr.splitlines()[0]
    assert not done.stdout


@pytest.mark.parametrize(("reply", "expected"), [("9.0\n", "90-real"), ("12.0\n8.6\n", "120-real"), ("8.6", "86-real")])
def test_the_architecture_is_the_cards(reply: str, expected: str, repo_root: Path, tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\nprintf '{reply}'\n")
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shown = subprocess.run(["sh", repo_root / "tests/gpu/card.sh"], env=env, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == expected


def full(rng: Any, off: float) -> dict[str, Any]:
    plain = {path: rng.normal(size=(4, 8)) for path in ("prompt", "single", "few", "many")}
    found = {f"plain {path}": logits for path, logits in plain.items()}
    for name, much in {"flash": 1e-3, "op": off, "stock": 1e-4}.items():
        found |= {f"{name} {path}": logits + much * np.abs(logits).max() for path, logits in plain.items()}
    return found


def where(n_op: int, elsewhere: int, splits: int) -> dict[str, Any]:
    parts = {"CUDA0": [4, n_op, 100], "CPU": [0, 0, elsewhere]}
    stock = {"parts": {"CUDA0": [4, 0, 100]}, "splits": 2}
    return {"op": {"parts": parts, "splits": splits}, "stock": stock, "flash": stock}


@pytest.mark.parametrize(
    ("off", "n_op", "elsewhere", "splits", "failed"),
    [
        (1e-3, 4, 0, 2, []),
        (0.1, 4, 0, 2, ["full rank, op"]),
        (1e-3, 3, 0, 2, ["where it ran, op"]),
        (1e-3, 4, 8, 2, ["where it ran, op"]),
        (1e-3, 4, 0, 3, ["splits, op"]),
    ],
)
def test_what_is_wrong_is_found(off: float, n_op: int, elsewhere: int, splits: int, failed: list[str]) -> None:
    checks = Checks()
    check_full_rank(checks, full(np.random.default_rng(1), off), where(n_op, elsewhere, splits), on_card=True)
    assert [row["name"] for row in checks.rows if not row["ok"]] == failed


def test_other_text_is_found_unless_two_tokens_are_as_probable() -> None:
    logits = np.array([[0.0, 3.0, 2.99], [4.0, 1.0, 0.0]])
    for tokens, noise, ok in (([1, 0], 0.0, True), ([2, 0], 1e-2, True), ([2, 0], 1e-4, False), ([1, 1], 1e-2, False)):
        checks = Checks()
        check_greedy(checks, "text", (np.array(tokens), logits), (np.array([1, 0]), logits), noise)
        assert checks.rows[0]["ok"] == ok


def test_other_compressed_logits_are_found() -> None:
    rng = np.random.default_rng(2)
    f16, packed, other = (rng.normal(size=(5, 16)) for _ in range(3))
    good = {"f16 at ratio": f16, "op at ratio": packed, "stock at ratio": packed, "op stored": 7, "stock stored": 7}
    for change, failed in (({}, 0), ({"op at ratio": other}, 2), ({"op stored": 6}, 1), ({"op at ratio": f16}, 3)):
        checks = Checks()
        check_ratio(checks, {**good, **change}, good)
        assert sum(not row["ok"] for row in checks.rows) == failed


def test_a_folder_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder, "MOST_BYTES", 1 << 18)
    monkeypatch.setattr(folder, "add_packages", lambda out, cache: None)
    monkeypatch.setattr(folder, "add_upstream", lambda build, out: None)
    with pytest.raises(folder.FolderError, match="MiB"):
        folder.assemble(tmp_path / "gpu", tmp_path)
    assert not (tmp_path / "gpu").exists()


def test_the_folder_has_what_a_build_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repo_root: Path) -> None:
    monkeypatch.setattr(folder, "cffi_wheel", lambda python, cache: empty_wheel(tmp_path))
    out = tmp_path / "gpu"
    out.mkdir()
    (out / "native").mkdir()
    (out / "native" / "gone.cpp").write_text("stale")
    (out / "results").mkdir()
    (out / "results" / "test.json").write_text("{}")
    (out / "build").mkdir()
    (out / "build" / "build.ninja").write_text("made there")
    (out / "native" / "include").mkdir()
    shutil.copyfile(repo_root / "native/include/xkv.h", out / "native/include/xkv.h")
    (out / "LICENSE").write_text("an older one")
    for name in ("native/include/xkv.h", "LICENSE"):
        os.utime(out / name, (1000, 1000))
    n_bytes = folder.assemble(out, tmp_path)
    assert 0 < n_bytes < 60 << 20
    for name in ("Makefile", "native/include/xkv.h", "build/upstream/key", "python/xkv_gguf/convert/__init__.py"):
        assert (out / name).is_file(), name
    assert not (out / "native" / "gone.cpp").exists() and (out / "results" / "test.json").exists()
    assert (out / "build" / "build.ninja").exists()
    # what did not change is not compiled again, and what did is, however old it is in the checkout
    assert (out / "native/include/xkv.h").stat().st_mtime == 1000 < time.time() - 60 < (out / "LICENSE").stat().st_mtime
    upstream = out / "build/upstream/llama.cpp/ggml/src"
    assert (upstream / "ggml-cuda" / "ggml-cuda.cu").is_file() and not (upstream / "ggml-vulkan").exists()
    for cmake in (repo_root / "CMakeLists.txt", *(repo_root / "native/cmake").glob("*.cmake")):
        text = cmake.read_text()
        for name in re.findall(r"\$\{XKV_UPSTREAM_DIR\}/([\w./-]+)", text):
            assert (out / "build/upstream/llama.cpp" / name).exists(), name
        for name in re.findall(r"\$\{PROJECT_SOURCE_DIR\}/([\w./-]+\.cpp)", text):
            assert (out / name).is_file(), name
    for source in out.glob("tests/**/*.cpp"):
        for name in re.findall(r'#include "([\w./-]+)"', source.read_text()):
            if (repo_root / source.relative_to(out).parent / name).is_file():
                assert (source.parent / name).is_file(), (source, name)
    # CMake there finds the tree up to date: it has no network
    check = [sys.executable, repo_root / "native/cmake/upstream.py", "--pin", out / "upstream.json"]
    check += ["--patches", out / "native/patches", "--cache", tmp_path / "none", "--out", out / "build/upstream"]
    done = subprocess.run(check, capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert done.returncode == 0 and not (tmp_path / "none").exists(), done.stderr


def empty_wheel(folder: Path) -> Path:
    path = folder / "cffi.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("_cffi_backend.cpython-312.so", "")
    return path
