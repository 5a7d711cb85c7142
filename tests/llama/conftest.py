"""What the tests of the front share: small caches, and opened models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf import Llama

# small enough that a prompt of some hundred tokens is mostly compressed
SMALL = {"n_sink": 4, "n_window": 64}
N_UBATCH = 64

Open = Callable[..., Llama]


@pytest.fixture
def open_llama(demo_model: Path, sidecar: Path) -> Iterator[Open]:
    """Opens the demo model, quiet and small, and closes it after the test."""
    opened: list[Llama] = []

    def open_one(kv_mode: str, **kwargs: Any) -> Llama:
        if kv_mode == "xkv":
            kwargs["xkv"] = {"sidecar": str(sidecar), **SMALL, **kwargs.get("xkv", {})}
            # the window has room for a micro-batch, and is used to its end
            kwargs.setdefault("n_ubatch", N_UBATCH)
        threads = min(2, os.cpu_count() or 1)
        settings = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads, "verbose": False, **kwargs}
        opened.append(Llama(demo_model, kv_mode=kv_mode, **settings))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()
