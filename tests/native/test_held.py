"""Sidecars that hold some of the directions: those count, others are zeros, and impossible numbers are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xkv_gguf.errors import SidecarError
from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import open_context
from .sidecars import write_random
from .test_full_rank import run_paths
from .tiny_models import MODELS, N_LAYER


@pytest.mark.parametrize("online", [False, True])
def test_what_a_cache_does_not_use_is_not_missed(
    online: bool, tiny: Callable[[str], Tiny], tokens: list[int], tmp_path: Path
) -> None:
    one, kind = tiny("llama"), MODELS["llama"]
    found = []
    for held in (None, 64):
        bases = write_random(tmp_path / str(held), N_LAYER, (kind.embd_k, kind.embd_v), 2, 32, held=held)
        with open_context(one.model, xkv=bases.params(rank=64, online=online, n_prior=0)) as ctx:
            found.append(run_paths(ctx, tokens))
    for path, logits in found[0].items():
        np.testing.assert_array_equal(found[1][path], logits)


def test_directions_beyond_are_zeros(tiny: Callable[[str], Tiny], tokens: list[int], tmp_path: Path) -> None:
    one, kind = tiny("llama"), MODELS["llama"]
    bases = write_random(tmp_path / "s", N_LAYER, (kind.embd_k, kind.embd_v), 2, 32, held=64)
    found = []
    for rank in (64, None):
        with open_context(one.model, xkv=bases.params(rank=rank)) as ctx:
            found.append(run_paths(ctx, tokens))
    for path, logits in found[0].items():
        np.testing.assert_allclose(found[1][path], logits, atol=1e-3)


@pytest.mark.parametrize("rows", [65, 1 << 40])
def test_impossible_numbers_of_directions(rows: int, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    kind = MODELS["llama"]
    bases = write_random(tmp_path / "s", N_LAYER, (kind.embd_k, kind.embd_v), 1, 32)
    data = bases.path.read_bytes()
    dim = len(bases.basis["k"][0])
    at = data.index(b"group.0.k.basis") + len("group.0.k.basis") + 4 + 8
    assert data[at : at + 8] == struct.pack("<Q", dim)
    rows += dim - 64
    bases.path.write_bytes(data[:at] + struct.pack("<Q", rows) + data[at + 8 :])
    with pytest.raises(SidecarError, match="sidecar"), native.scope(bases.params()):
        pass
