"""A cross-layer low-rank KV cache for GGUF models on llama.cpp.

``Llama`` is `llama_cpp.Llama` with the keyword ``kv_mode``; import this package before llama_cpp is imported, so that
the patched library is the one that is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import first

if TYPE_CHECKING:
    from .errors import XkvError
    from .llama import Llama
    from .options import XkvOptions
    from .report import KvDevice, KvPart, KvReport

__version__ = "0.1.0"
__all__ = ["KvDevice", "KvPart", "KvReport", "Llama", "XkvError", "XkvOptions", "__version__"]

# imported when first used: the library and llama_cpp take longer to load than the command line's help needs
_MODULES = {
    "KvDevice": "report",
    "KvPart": "report",
    "KvReport": "report",
    "Llama": "llama",
    "XkvError": "errors",
    "XkvOptions": "options",
}

first.install()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
