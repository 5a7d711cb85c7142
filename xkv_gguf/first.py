"""Lets llama_cpp find the patched library, when it is imported after xkv_gguf and before `Llama` is taken from it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

NAME = "llama_cpp"


class _Finder:
    """Finds llama_cpp, once, as others would."""

    def __init__(self) -> None:
        self._busy = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != NAME or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(NAME)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """Another loader, inside which llama_cpp is told where its library is."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        loader = importlib.import_module(f"{__package__}.runtime.loader")
        # without a library of ours, llama_cpp goes on as it would, and what is taken from here says what is missing
        if not loader.has_library():
            self._loader.exec_module(module)
            return
        with loader.library_path(loader.LIB_DIR):
            self._loader.exec_module(module)


def install() -> None:
    """Be asked for llama_cpp from here on, unless it is there already."""
    if NAME not in sys.modules:
        sys.meta_path.insert(0, _Finder())
