"""The loader: one libllama in the process, ours, or a one-line error. Each case runs in its own process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from xkv_gguf.runtime import loader

ROOT = loader.PYTHON_DIR.parent

Run = Callable[..., list[str]]


@pytest.fixture
def run() -> Run:
    """Run Python text in a new process; returns the lines it prints. ``path`` goes in front of sys.path."""

    def run_text(text: str, path: Path = ROOT) -> list[str]:
        lead = f"import sys; sys.path[:0] = {[str(path), str(ROOT)]!r}\n"
        done = subprocess.run(
            [sys.executable, "-I", "-c", lead + text], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run_text


@pytest.fixture
def other_lib(tmp_path: Path) -> Path:
    """A folder with a second copy of the libraries."""
    return Path(shutil.copytree(loader.LIB_DIR, tmp_path / "other"))


def copy_python(folder: Path) -> Path:
    """Copy the Python that the loader needs; returns the package's folder."""
    package = folder / "xkv_gguf"
    (package / "runtime").mkdir(parents=True)
    for name in ("__init__.py", "runtime/__init__.py"):
        (package / name).touch()
    for name in ("errors.py", "runtime/loader.py"):
        shutil.copy(loader.PYTHON_DIR / name, package / name)
    return package


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Another checkout with the same native sources, and no library."""
    folder = tmp_path / "checkout"
    copy_python(folder)
    shutil.copytree(ROOT / "native", folder / "native", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "upstream.json", folder)
    return folder


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package that only holds what the loader needs."""
    package = copy_python(tmp_path / "site")
    shutil.copy(loader.PACKAGE_DIR / "_build_info.py", package)
    shutil.copytree(loader.LIB_DIR, package / "lib")
    return package


EXPECT_ERROR = """
from xkv_gguf.runtime import loader
from xkv_gguf.errors import LibraryError
try:
    {call}
except LibraryError as error:
    print(error)
"""


def test_loads_the_installed_library(run: Run) -> None:
    lines = run(
        "import os; from xkv_gguf.runtime import loader; library = loader.load()\n"
        "import llama_cpp, runpy; info = runpy.run_path(str(loader.PACKAGE_DIR / '_build_info.py'))\n"
        "print(library.path); print(library.build_id == info['BUILD_ID'] and len(info['BUILD_ID']))\n"
        "print(library.handle is llama_cpp.llama_cpp._lib); print(loader.load() is library)\n"
        "print('LLAMA_CPP_LIB_PATH' in os.environ); print(library.header.is_file())\n"
        "print(sum('/libllama.' in path for path in map(str, loader.mapped_libraries())))\n"
    )
    assert Path(lines[0]).parent == loader.LIB_DIR
    assert lines[1:] == ["32", "True", "True", "False", "True", "1"]


def test_puts_the_users_variable_back(run: Run) -> None:
    lines = run(
        "import os; os.environ['LLAMA_CPP_LIB_PATH'] = '/nowhere'\n"
        "from xkv_gguf.runtime import loader; print(loader.load().path.parent); print(os.environ['LLAMA_CPP_LIB_PATH'])"
    )
    assert lines == [str(loader.LIB_DIR), "/nowhere"]


def test_llama_cpp_imported_first_on_another_library(run: Run, other_lib: Path) -> None:
    lines = run(
        f"import os; os.environ['LLAMA_CPP_LIB_PATH'] = {str(other_lib)!r}\nimport llama_cpp\n"
        + EXPECT_ERROR.format(call="loader.load()")
    )
    assert len(lines) == 1
    assert str(other_lib) in lines[0]
    assert "import xkv_gguf before llama_cpp" in lines[0]


def test_llama_cpp_imported_first_on_our_library(run: Run) -> None:
    lines = run(
        f"import os; os.environ['LLAMA_CPP_LIB_PATH'] = {str(loader.LIB_DIR)!r}\nimport llama_cpp\n"
        "from xkv_gguf.runtime import loader; print(loader.load().path.parent)"
    )
    assert lines == [str(loader.LIB_DIR)]


def test_after_a_failed_import_of_llama_cpp(run: Run) -> None:
    """As in a notebook whose first cell had the wrong order, where llama-cpp-python has no library of its own."""
    lines = run(
        "try:\n    import llama_cpp\nexcept (OSError, RuntimeError) as error:\n    print(type(error).__name__)\n"
        "from xkv_gguf.runtime import loader; print(loader.load().path.parent)"
    )
    assert lines[-1] == str(loader.LIB_DIR)


@pytest.mark.parametrize("first", ["import xkv_gguf", "import xkv_gguf.errors"])
def test_llama_cpp_imported_after_the_package(run: Run, first: str) -> None:
    """Before anything is taken from the package that needs the library."""
    lines = run(
        f"{first}\nimport os, llama_cpp\nfrom llama_cpp import LlamaGrammar\n"
        "print('LLAMA_CPP_LIB_PATH' in os.environ); print(llama_cpp.__spec__.name)\n"
        "from xkv_gguf.runtime import loader; print(loader.load().path.parent)"
    )
    assert lines == ["False", "llama_cpp", str(loader.LIB_DIR)]


def test_imports_in_several_threads(run: Run) -> None:
    lines = run(
        "import threading\nfound = []\n"
        "def load():\n    from xkv_gguf import Llama\n    found.append(Llama)\n"
        "threads = [threading.Thread(target=load) for _ in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "import os; print(len(found), len(set(found)), 'LLAMA_CPP_LIB_PATH' in os.environ)"
    )
    assert lines == ["4 1 False"]


def test_compiled_llama_cpp_python_is_harmless(run: Run, other_lib: Path, tmp_path: Path) -> None:
    spec = find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    site = tmp_path / "compiled"
    shutil.copytree(Path(spec.origin).parent, site / "llama_cpp", ignore=shutil.ignore_patterns("lib"))
    shutil.copytree(other_lib, site / "llama_cpp" / "lib")
    lines = run(
        "from xkv_gguf.runtime import loader; library = loader.load(); import llama_cpp\n"
        "print(llama_cpp.__file__); print(llama_cpp.llama_cpp._lib._name)",
        path=site,
    )
    assert lines == [str(site / "llama_cpp" / "__init__.py"), str(loader.LIB_DIR / Path(lines[1]).name)]


def test_second_library_after_ours(run: Run, other_lib: Path) -> None:
    lines = run(
        "import ctypes; from xkv_gguf.runtime import loader; library = loader.load(); loader.verify()\n"
        f"ctypes.CDLL({str(other_lib)!r} + '/' + library.path.name)\n" + EXPECT_ERROR.format(call="loader.verify()")
    )
    assert len(lines) == 1
    assert "a second libllama is loaded" in lines[0]
    assert str(other_lib) in lines[0]


@pytest.mark.skipif(sys.platform != "linux", reason="the linker of this system goes by path")
def test_another_ggml_of_the_same_name(run: Run, other_lib: Path) -> None:
    lines = run(
        f"import ctypes; ctypes.CDLL({str(other_lib / 'libggml-base.so')!r})\n"
        + EXPECT_ERROR.format(call="loader.load()")
    )
    assert len(lines) == 1
    assert f"libllama runs on {other_lib / 'libggml-base.so'}" in lines[0]


def test_a_checkout_takes_the_installed_library(run: Run, checkout: Path) -> None:
    (checkout / "native" / "cmake" / "__pycache__").mkdir()
    (checkout / "native" / "cmake" / "__pycache__" / "upstream.pyc").touch()
    lines = run("from xkv_gguf.runtime import loader; print(loader.__file__, loader.load().path.parent)", path=checkout)
    assert lines == [f"{checkout / 'xkv_gguf' / 'runtime' / 'loader.py'} {loader.LIB_DIR}"]


@pytest.mark.parametrize("name", ["native/include/xkv.h", "native/base/new.cpp", "upstream.json"])
def test_a_checkout_with_other_native_sources(run: Run, checkout: Path, name: str) -> None:
    with (checkout / name).open("a") as file:
        file.write("\n")
    lines = run(EXPECT_ERROR.format(call="loader.load()"), path=checkout)
    assert len(lines) == 1
    assert f"was built from other sources than those in {checkout / 'native'}" in lines[0]


def test_other_build_id(run: Run, package_copy: Path) -> None:
    (package_copy / "_build_info.py").write_text('BUILD_ID = "0123"\n')
    lines = run(EXPECT_ERROR.format(call="loader.load()"), path=package_copy.parent)
    assert len(lines) == 1
    assert "the package expects 0123" in lines[0]


def test_package_without_library(run: Run, package_copy: Path) -> None:
    shutil.rmtree(package_copy / "lib")
    lines = run(EXPECT_ERROR.format(call="loader.load()"), path=package_copy.parent)
    assert len(lines) == 1
    assert "install the package" in lines[0]


def test_file_that_is_no_library(run: Run, package_copy: Path) -> None:
    for path in (package_copy / "lib").glob("libllama.*"):
        path.write_bytes(b"not a library")
    lines = run(EXPECT_ERROR.format(call="loader.load()"), path=package_copy.parent)
    assert len(lines) == 1
    assert "llama_cpp does not start" in lines[0]


def test_library_without_our_functions(run: Run, package_copy: Path) -> None:
    # an unpatched libllama is one without xkv_build_id: rename it in the symbol's text
    for path in (package_copy / "lib").glob("libllama.*"):
        path.write_bytes(path.read_bytes().replace(b"xkv_build_id\0", b"xkv_build_ix\0"))
    lines = run(EXPECT_ERROR.format(call="loader.load()"), path=package_copy.parent)
    assert len(lines) == 1
    assert "is not the patched libllama" in lines[0]
