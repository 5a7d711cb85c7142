"""llama_cpp on the patched library. Modules of this package take it from here, so that it is loaded in time."""

from __future__ import annotations

from . import loader

loader.load()

import llama_cpp  # noqa: E402
from llama_cpp import _internals as internals  # noqa: E402
from llama_cpp import _logger as llama_cpp_logger  # noqa: E402
from llama_cpp import llama as llama_cpp_module  # noqa: E402
from llama_cpp._utils import suppress_stdout_stderr  # noqa: E402

__all__ = ["internals", "llama_cpp", "llama_cpp_logger", "llama_cpp_module", "suppress_stdout_stderr"]
