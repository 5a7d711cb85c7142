"""`make gpu-folder`: one folder with all that a machine with a card needs, which has a compiler, nvcc and no network.

Beside those, it needs CMake, make and Python 3.10 or newer with numpy. The patched llama.cpp lies where the build puts
it (build/upstream, with the key of the patches), so that CMake there neither fetches nor patches. Of Python packages
only what is imported is taken, as source; cffi's compiled part for several versions of Python.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 60 << 20

# of this repository
SOURCES = (
    "CMakeLists.txt",
    "upstream.json",
    "LICENSE",
    "native",
    "tests/fuzz",
    "tests/gpu",
    "tests/native",
    "tests/shims",
)
PYTHON = ("xkv_gguf", "benchmarks", "tests/gpu", "tests/native")
# of llama.cpp; backends of other devices and what needs llama-common are left out
UPSTREAM = ("CMakeLists.txt", "LICENSE", "cmake", "include", "src", "vendor", "ggml")
INSTALLED = ("convert_hf_to_gguf.py", "conversion", "licenses", "gguf-py/gguf", "gguf-py/LICENSE")
OTHER_BACKENDS = [
    "blas",
    "cann",
    "et",
    "hexagon",
    "hip",
    "musa",
    "opencl",
    "openvino",
    "sycl",
    "virtgpu",
    "vulkan",
    "webgpu",
    "zdnn",
    "zendnn",
]
# headers of programs that are not built, megabytes of them
NO_HEADERS = ("vendor/nlohmann", "vendor/miniaudio", "vendor/stb", "vendor/sheredom", "vendor/cpp-httplib")
PACKAGES = ("llama_cpp", "gguf", "jinja2", "markupsafe", "diskcache", "yaml", "tqdm", "cffi", "pycparser")
MODULES = ("typing_extensions",)
CFFI_PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_26_x86_64", "manylinux_2_28_x86_64")
LAPACK = "scipy_openblas32"


class FolderError(Exception):
    """One line that says what is missing."""


def copy(source: Path, target: Path, ignore: Iterable[str] = ()) -> None:
    """Copy a file or a folder, links as what they lead to, times as of now."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, target)
    else:
        left_out = shutil.ignore_patterns("__pycache__", "*.pyc", *ignore)
        shutil.copytree(source, target, ignore=left_out, copy_function=shutil.copyfile, dirs_exist_ok=True)


def synchronize(fresh: Path, out: Path) -> None:
    """Make `out` hold what `fresh` holds; a file that is the same keeps its time, so that it is not compiled again."""
    if fresh.is_file():
        if not out.is_file() or not filecmp.cmp(fresh, out, shallow=False):
            os.replace(fresh, out)
        return
    out.mkdir(exist_ok=True)
    names = {path.name for path in fresh.iterdir()}
    for old in out.iterdir():
        if old.name not in names and old not in kept(out):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for path in fresh.iterdir():
        synchronize(path, out / path.name)


def kept(folder: Path) -> list[Path]:
    """What a machine made in a folder: all of build/ but what we put there, and results/."""
    return list(folder.iterdir()) if folder.name == "build" else [folder / "results", folder / "build"]


def add_upstream(build: Path, out: Path) -> None:
    """The patched llama.cpp, without what is not built."""
    source, target = build / "upstream" / "llama.cpp", out / "build" / "upstream" / "llama.cpp"
    for name in (*UPSTREAM, *INSTALLED):
        if name != "vendor":
            copy(source / name, target / name, [f"ggml-{backend}" for backend in OTHER_BACKENDS])
    for one in sorted((source / "vendor").rglob("*")):
        name = one.relative_to(source).as_posix()
        if one.is_file() and (one.name == "CMakeLists.txt" or not name.startswith(NO_HEADERS)):
            copy(one, target / name)
    copy(build / "upstream" / "key", out / "build" / "upstream" / "key")


def add_packages(out: Path, cache: Path) -> None:
    """Python packages as source, cffi's compiled part, and LAPACK with its licence."""
    for name in PACKAGES:
        copy(package_path(name), out / "python" / name, ["*.so", "server", "scripts", "tests"])
    for name in MODULES:
        copy(package_path(name) / f"{name}.py", out / "python" / f"{name}.py")
    for python in CFFI_PYTHONS:
        with zipfile.ZipFile(cffi_wheel(python, cache)) as wheel:
            for name in wheel.namelist():
                if name.startswith("_cffi_backend.") and name.endswith(".so"):
                    wheel.extract(name, out / "python")
    copy(package_path(LAPACK), out / "build" / "lapack" / LAPACK)
    # CMake finds the licence through the package's metadata
    [info] = package_path(LAPACK).parent.glob(f"{LAPACK}-*.dist-info")
    copy(info, out / "build" / "lapack" / info.name)


def package_path(name: str) -> Path:
    """Where a package lies."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FolderError(f"Python package {name} is missing: make build")
    return Path(spec.origin).parent


def cffi_wheel(python: str, cache: Path) -> Path:
    """The wheel of cffi for a version of Python, fetched once."""
    tag = f"cp{python.replace('.', '')}"
    pattern = f"cffi-{version('cffi')}-{tag}-{tag}-*x86_64.whl"
    if not any(cache.glob(pattern)):
        cache.mkdir(parents=True, exist_ok=True)
        words = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        words += [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *words, "--dest", str(cache)]
        done = subprocess.run([*command, f"cffi=={version('cffi')}"], capture_output=True, text=True)
        if done.returncode != 0:
            raise FolderError(f"pip could not fetch cffi {version('cffi')} for Python {python}: {done.stderr.strip()}")
    return next(cache.glob(pattern))


def newest_build() -> Path:
    """The build folder whose llama.cpp is the one of this checkout's patches."""
    found = sorted(ROOT.glob("build/*/upstream/key"), key=os.path.getmtime)
    if not found:
        raise FolderError("there is no build/*/upstream: make build")
    return found[-1].parents[1]


def assemble(out: Path, cache: Path) -> int:
    """Write the folder anew, except for what was built in it and its results; returns its bytes without those."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        fresh = Path(temporary) / "folder"
        for name in SOURCES:
            copy(ROOT / name, fresh / name)
        for name in PYTHON:
            copy(ROOT / name, fresh / "python" / name, ["results"])
        copy(ROOT / "tests/gpu/folder.mk", fresh / "Makefile")
        add_upstream(newest_build(), fresh)
        add_packages(fresh, cache)
        n_bytes = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
        if n_bytes > MOST_BYTES:
            raise FolderError(f"the folder would have {n_bytes >> 20} MiB, expected at most {MOST_BYTES >> 20}")
        synchronize(fresh, out)
    return n_bytes


def main() -> int:
    """Assemble the folder that the argument names."""
    parser = argparse.ArgumentParser(description="Assemble the folder for a machine with a card.")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    assert distribution("xkv-gguf")  # its dependencies are the packages that are copied
    try:
        n_bytes = assemble(args.out, ROOT / ".cache" / "gpu")
    except FolderError as error:
        print(f"gpu-folder: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {n_bytes / (1 << 20):.0f} MiB; copy it to a machine with a card, there: make test, make bench")
    return 0


if __name__ == "__main__":
    sys.exit(main())
