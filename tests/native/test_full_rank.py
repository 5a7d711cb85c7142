"""The full-rank invariant: with all directions kept, an xkv cache equals the plain cache, whatever the bases are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .conftest import Tiny
from .harness import deviation as deviation
from .harness import open_context
from .harness import run_paths as run_paths
from .tiny_models import MODELS

# of the largest logit; absorbed attention works in f32
TOL_F32 = 1e-3
# flash attention rounds to f16: how much more than the plain f16 cache with flash attention may an xkv cache be off
TOL_FLASH = 5.0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("group_size", "frame"), [(1, 32), (2, 64), (3, 32), (4, 128)])
def test_equals_plain_cache(
    name: str, group_size: int, frame: int, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    one = tiny(name)
    with open_context(one.model, flash_attn=False) as ctx:
        plain = run_paths(ctx, tokens)
    with open_context(one.model, exact=False) as ctx:
        flash = run_paths(ctx, tokens)
    with open_context(one.model, xkv=one.bases(group_size, frame).params()) as ctx:
        xkv = run_paths(ctx, tokens)
    noise = max(deviation(flash[path], plain[path]) for path in plain)
    for path in plain:
        assert deviation(xkv[path], plain[path]) <= TOL_FLASH * noise + TOL_F32, path


@pytest.mark.parametrize("name", MODELS)
def test_absorbed_only_is_tight(name: str, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Without flash attention anywhere, only f32 rounding is left."""
    one = tiny(name)
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:400], 8)
    with open_context(one.model, xkv=one.bases().params(n_absorb=8)) as ctx:
        xkv = ctx.feed(tokens[:400], 8)
    assert deviation(xkv, plain) <= TOL_F32


@pytest.mark.parametrize("rank", [32, None])
def test_paths_agree_at_any_rank(rank: int | None, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Materialized and absorbed attention are two ways to compute one thing, at low rank as well."""
    one = tiny("llama")
    logits = []
    for n_absorb in (8, 0):
        with open_context(one.model, xkv=one.bases().params(rank=rank, n_absorb=n_absorb)) as ctx:
            logits.append(ctx.feed(tokens[:400], 8))
    noise = []
    for flash_attn in (False, True):
        with open_context(one.model, exact=False, flash_attn=flash_attn) as ctx:
            noise.append(ctx.feed(tokens[:400], 8))
    # what is lost at low rank makes the model more sensitive to rounding
    assert deviation(*logits) <= (1 if rank is None else 2) * TOL_FLASH * deviation(*noise)


@pytest.mark.parametrize("n_absorb", [8, 0])
def test_error_falls_with_bits(n_absorb: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Every type of coefficients runs on both paths, and finer types are closer to the plain cache."""
    one = tiny("llama")
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:400], 8)
    errors = {}
    for type_coef in ("f32", "f16", "q8_0", "q5_0", "q4_0"):
        with open_context(one.model, xkv=one.bases().params(type_coef=type_coef, n_absorb=n_absorb)) as ctx:
            xkv = ctx.feed(tokens[:400], 8)
        errors[type_coef] = float(np.sqrt(((xkv - plain) ** 2).mean()) / plain.std())
    assert errors["f16"] < 2e-2 < 2 * errors["q8_0"]
    assert errors["f32"] <= errors["f16"] < errors["q8_0"] < errors["q5_0"] < errors["q4_0"] < 1.0


def test_low_rank_is_not_exact(tiny: Callable[[str], Tiny], tokens: list[int], tmp_path: Path) -> None:
    """The store is in use: with a quarter of the directions the logits move."""
    one = tiny("llama")
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:400], 8)
    with open_context(one.model, xkv=one.bases(4, 32).params(rank=32)) as ctx:
        xkv = ctx.feed(tokens[:400], 8)
    assert np.abs(xkv - plain)[-1].max() > 0.05 * np.abs(plain).max()
    assert deviation(xkv[:96], plain[:96]) <= TOL_F32  # nothing has left the window yet
