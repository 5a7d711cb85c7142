"""Imports go one way: a room imports from those before it in `ROOMS`, never back."""

from __future__ import annotations

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

import xkv_gguf

ROOMS = (
    ("errors", "base", "first"),
    ("plan",),
    ("model",),
    ("sidecar",),
    ("runtime",),
    ("convert",),
    ("options", "report", "opening", "placing", "fitting", "describe", "states"),
    ("completion",),
    ("llama",),
    ("lab",),
    ("cli", "demo", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}


def imported(source: str, package: str) -> set[str]:
    """Rooms that a module of a package imports from, inside functions and for type checkers as well."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    rooms = {name.split(".")[1] for name in names if name.startswith("xkv_gguf.")}
    return {xkv_gguf._MODULES.get(room, room) for room in rooms} - {"__version__"}


def back(source: str, module: str) -> set[str]:
    """Rooms that a module must not import from."""
    floor = FLOOR[module.split(".")[1]]
    return {room for room in imported(source, module.rpartition(".")[0]) if FLOOR[room] > floor}


def modules() -> dict[str, Path]:
    root = Path(xkv_gguf.__file__).parent
    # rglob does not follow the link to convert/
    paths = {*root.rglob("*.py"), *(root / "convert").glob("*.py")} - {root / "__init__.py"}
    return {".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in sorted(paths)}


def test_imports_go_one_way() -> None:
    found = {module: back(path.read_text(), module) for module, path in modules().items()}
    assert len(found) > 80 and "xkv_gguf.convert.pipeline" in found
    assert not {module: rooms for module, rooms in found.items() if rooms}


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from ..sidecar.read import Sidecar", "xkv_gguf.plan.stages", {"sidecar"}),
        ("def f():\n    from .. import Llama, errors", "xkv_gguf.runtime.native", {"llama"}),
        ("import xkv_gguf.lab.metrics\nfrom xkv_gguf import __version__", "xkv_gguf.convert.pipeline", {"lab"}),
        ("from ...cli import main", "xkv_gguf.lab.ruler.run", {"cli"}),
        ("from ..model import file\nfrom .read import Sidecar", "xkv_gguf.sidecar.write", set()),
    ],
)
def test_an_import_that_goes_back_is_found(source: str, module: str, expected: set[str]) -> None:
    assert back(source, module) == expected
