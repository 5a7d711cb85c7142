"""Tiny models and their sidecars, opened once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .harness import close_model, open_model
from .sidecars import Bases, write_random
from .tiny_models import MODELS, N_LAYER, N_VOCAB, REFUSED, WIDE, write_model


@dataclass(frozen=True)
class Tiny:
    """A loaded tiny model: its file, its llama_model, its tensors, and a maker of sidecars."""

    path: Path
    model: Any
    tensors: dict[str, np.ndarray]
    bases: Callable[..., Bases]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Tiny]]:
    """Get a tiny model by name."""
    folder = tmp_path_factory.mktemp("tiny")
    opened: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in opened:
            path = folder / f"{name}.gguf"
            tensors = write_model(name, path)
            kind = (MODELS | WIDE | REFUSED)[name]
            written: dict[tuple[int, int, float], Bases] = {}

            def bases(group_size: int = 2, frame: int = 32, fall: float = 0.0) -> Bases:
                key = (group_size, frame, fall)
                if key not in written:
                    side = folder / f"{name}.{group_size}.{frame}.{fall}.xkv.gguf"
                    embd = (kind.embd_k, kind.embd_v)
                    written[key] = write_random(side, N_LAYER, embd, group_size, frame, fall=fall)
                return written[key]

            opened[name] = Tiny(path, open_model(path), tensors, bases)
        return opened[name]

    yield get
    for one in opened.values():
        close_model(one.model)


@pytest.fixture(scope="session")
def tokens() -> list[int]:
    """Random tokens."""
    return [int(t) for t in np.random.default_rng(1).integers(0, N_VOCAB, 1000)]
