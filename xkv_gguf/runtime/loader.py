"""Loads the patched libllama, and makes sure that it is the only one in the process.

It lies in the installed package. Python that runs from a checkout takes it from there, provided that it was built from
the native sources of this checkout.

llama-cpp-python takes its library from the folder in ``LLAMA_CPP_LIB_PATH`` when it is imported. A second libllama
beside ours (llama-cpp-python's own, when it was compiled) would see other structs behind the same pointers.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import os
import runpy
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..errors import LibraryError

PYTHON_DIR = Path(__file__).resolve().parents[1]
NATIVE_DIR = PYTHON_DIR.parent / "native"
"""Sources of the library where this module lies in a checkout."""

SUFFIXES = (".so", ".dylib")


def _package_dir() -> Path:
    """The package that holds the library, its header and upstream's converter."""
    if NATIVE_DIR.is_dir():
        with contextlib.suppress(PackageNotFoundError):
            return Path(str(distribution("xkv-gguf").locate_file("xkv_gguf"))).resolve()
    return PYTHON_DIR


PACKAGE_DIR = _package_dir()
LIB_DIR = PACKAGE_DIR / "lib"
HEADER = PACKAGE_DIR / "include" / "xkv.h"
LIB_PATH_VARIABLE = "LLAMA_CPP_LIB_PATH"


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Attributes
    ----------
    path : file of libllama; opening it again gives the same library
    handle : what llama_cpp calls llama_* through
    header : the C header with the declarations between the CFFI markers
    build_id : hash of the sources it was built from
    """

    path: Path
    handle: ctypes.CDLL
    header: Path
    build_id: str


_library: Library | None = None
_lock = threading.Lock()


def load() -> Library:
    """Import llama_cpp on the patched libllama; later calls return the same object.

    Raises
    ------
    LibraryError
        The library is missing or of another build, or another libllama is loaded.
    """
    global _library
    with _lock:
        if _library is None:
            _library = _load()
    return _library


def _load() -> Library:
    expected = _expected_build_id()
    handle = _import_llama_cpp()
    path = Path(handle._name).resolve()
    if path.parent != LIB_DIR:
        raise LibraryError(
            f"llama_cpp runs on {path}, expected a library in {LIB_DIR}: "
            "import xkv_gguf before llama_cpp (with isort: `import xkv_gguf  # isort: skip`)"
        )
    found = _build_id(handle, path)
    if found != expected:
        raise LibraryError(
            f"{path} has build id {found}, the package expects {expected}: "
            "reinstall with `pip install --force-reinstall --no-deps xkv-gguf`"
        )
    verify()
    return Library(path, handle, HEADER, found)


def verify() -> None:
    """Check the process's mapped files; cheap, so it can be repeated before a model is loaded.

    Raises
    ------
    LibraryError
        A second libllama is loaded, or libllama bound to another package's ggml.
    """
    paths = mapped_libraries()
    if paths is None:
        return
    ours = {path.name for path in paths if path.parent == LIB_DIR}
    for path in sorted(paths):
        if path.parent == LIB_DIR:
            continue
        stem = path.name.partition(".")[0]
        if stem == "libllama":
            raise LibraryError(
                f"a second libllama is loaded from {path} beside the one in {LIB_DIR}: "
                "start a new process, without another binding of llama.cpp and without llama_cpp's multimodal handlers"
            )
        # the dynamic linker takes a library with the wanted name that is already there
        if stem in ("libggml", "libggml-base") and not any(name.startswith(f"{stem}.") for name in ours):
            raise LibraryError(
                f"libllama runs on {path}, expected {stem} of {LIB_DIR}: "
                "import Llama from xkv_gguf before the package that brings the other ggml"
            )


def mapped_libraries() -> set[Path] | None:
    """Files of libllama and libggml that the process has mapped; None where the system cannot tell."""
    if sys.platform == "linux":
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            return None
        # address perms offset dev inode path; the path may hold spaces
        fields = (line.split(maxsplit=5) for line in lines)
        names = {field[5].removesuffix(" (deleted)") for field in fields if len(field) == 6}
    elif sys.platform == "darwin":
        names = set(_dyld_images())
    else:
        return None
    return {Path(name).resolve() for name in names if Path(name).name.startswith(("libllama.", "libggml"))}


def _dyld_images() -> Iterator[str]:
    """Paths of the images that macOS' dynamic linker has loaded."""
    dyld = ctypes.CDLL(None)
    dyld._dyld_get_image_name.restype = ctypes.c_char_p
    for index in range(dyld._dyld_image_count()):
        name = dyld._dyld_get_image_name(ctypes.c_uint32(index))
        if name:
            yield os.fsdecode(name)


def has_library() -> bool:
    """Whether the package has its library."""
    return any((LIB_DIR / f"libllama{suffix}").is_file() for suffix in SUFFIXES)


def _expected_build_id() -> str:
    """Build id that the library has to have, once its sources are found to be those of the checkout, if this is one."""
    if not has_library():
        raise LibraryError(f"no libllama in {LIB_DIR}: install the package (`make build` or `pip install .`)")
    try:
        info = runpy.run_path(str(PACKAGE_DIR / "_build_info.py"))
    except OSError as error:
        raise LibraryError(f"{PACKAGE_DIR} has no _build_info.py: reinstall the package") from error
    if PACKAGE_DIR != PYTHON_DIR and info.get("NATIVE_ID") != native_id(NATIVE_DIR):
        raise LibraryError(
            f"the library in {LIB_DIR} was built from other sources than those in {NATIVE_DIR}: "
            "build it again (`make build` or `pip install .`)"
        )
    return str(info["BUILD_ID"])


def native_id(folder: Path) -> str:
    """Hash over native sources and the pin of upstream, as native/cmake/build-id.cmake computes it."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [*(path for path in paths if "__pycache__" not in path), "../upstream.json"]
    lines = (f"\n{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def _import_llama_cpp() -> ctypes.CDLL:
    """Import llama_cpp with our library folder; returns the library that it calls."""
    try:
        with library_path(LIB_DIR):
            module = importlib.import_module("llama_cpp.llama_cpp")
    except ModuleNotFoundError as error:
        raise LibraryError(f"the Python package {error.name} is missing: `pip install llama-cpp-python`") from error
    except (OSError, RuntimeError) as error:
        raise LibraryError(f"llama_cpp does not start on {LIB_DIR}: {' '.join(str(error).split())}") from error
    handle = module._lib
    assert isinstance(handle, ctypes.CDLL)
    return handle


@contextlib.contextmanager
def library_path(folder: Path) -> Iterator[None]:
    """Set the variable that llama_cpp reads at import, and put the user's value back."""
    before = os.environ.get(LIB_PATH_VARIABLE)
    os.environ[LIB_PATH_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[LIB_PATH_VARIABLE]
        else:
            os.environ[LIB_PATH_VARIABLE] = before


def _build_id(handle: ctypes.CDLL, path: Path) -> str:
    """Build id that a library reports."""
    try:
        # by item: llama_cpp's handle is shared, and attribute access would leave the prototype on it
        function = handle["xkv_build_id"]
    except AttributeError as error:
        raise LibraryError(f"{path} is not the patched libllama (no xkv_build_id): reinstall the package") from error
    function.restype = ctypes.c_char_p
    return str(function().decode())
