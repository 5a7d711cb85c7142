"""The native cache against the plain NumPy reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import open_context
from .reference import Reference


@pytest.mark.parametrize(("group_size", "frame", "rank"), [(1, 32, 32), (2, 32, 32), (4, 64, 96), (3, 32, 64)])
def test_low_rank_attention(
    group_size: int, frame: int, rank: int, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    one = tiny("llama")
    bases = one.bases(group_size, frame)
    params = bases.params(rank=rank, n_absorb=8)
    reference = Reference(one.tensors, bases, rank)
    expected = np.concatenate([reference.decode(tokens[i : i + 7]) for i in range(0, 350, 7)])
    with open_context(one.model, xkv=params) as ctx:
        found = ctx.feed(tokens[:350], 7)
        assert native.seq_tokens(ctx.ptr, 0) == (350 - reference.n_stored, reference.n_stored)
    assert reference.n_stored > 150
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


def test_reference_is_the_model(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Without a store, the reference is what llama.cpp computes."""
    one = tiny("llama")
    expected = Reference(one.tensors, None, 0).decode(tokens[:100])
    with open_context(one.model, flash_attn=False) as ctx:
        found = ctx.decode((0, tokens[:100]))
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
