"""Every architecture that llama.cpp can load: an xkv cache equals the plain one at full rank, or is refused by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xkv_gguf.errors import UnsupportedError
from xkv_gguf.model.tested import TESTED
from xkv_gguf.runtime import native
from xkv_gguf.runtime.shape import Layer, file_shape, held_layers

from ..native.harness import Context, close_model, lib, open_context, open_model
from ..native.sidecars import Bases, write_random
from ..native.state import load, save
from ..native.test_full_rank import TOL_F32, TOL_FLASH, deviation
from .conftest import run_program
from .table import ARCHS, HELD, HYBRID, LATENTS, REFUSED, SAMPLES, WINDOWED

Make = Callable[[str], Path]

MEAN_SIZE = {"k": 0.02, "v": 0.02}
"""Of random sidecars: these models have small numbers, and flash attention rounds V minus its mean to f16."""

FIXED = ("qwen35",)
"""Samples whose positions llama.cpp does not shift."""

TOKENS = [int(t) for t in np.random.default_rng(1).integers(0, 128, 250)]
"""As many as models with learnt positions have: tokens leave the window after 140."""


@dataclass(frozen=True)
class Loaded:
    """A model, the layers that the cache holds, and random bases of groups of two of them."""

    model: Any
    layers: list[Layer]
    bases: Bases


@contextmanager
def loaded(path: Path) -> Iterator[Loaded]:
    model = open_model(path)
    try:
        layers = held_layers(model)
        size = {**MEAN_SIZE, "v": 0.0 if layers[0].sinks else MEAN_SIZE["v"]}
        embd = [(one.embd_k, one.embd_v) for one in layers]
        side = path.with_suffix(".xkv.gguf")
        n_layer = lib.llama_model_n_layer(model)
        held = [one.layer for one in layers]
        yield Loaded(model, layers, write_random(side, n_layer, embd, 2, 32, layers=held, mean_size=size))
    finally:
        close_model(model)


def run_paths(ctx: Context, tokens: Sequence[int] = TOKENS) -> dict[str, np.ndarray]:
    """Logits of a prompt in micro-batches, of single tokens, and of batches between."""
    parts = {"prompt": (0, 160, 64), "single": (160, 200, 1), "few": (200, 220, 5), "many": (220, 250, 30)}
    return {name: ctx.feed(tokens[a:b], n) for name, (a, b, n) in parts.items()}


def plain(model: Any) -> tuple[dict[str, np.ndarray], float]:
    """Logits of the plain cache, without flash attention where the model allows that; and how far it is off with."""
    with open_context(model, exact=False) as ctx:
        flash = run_paths(ctx)
    try:
        with open_context(model, flash_attn=False) as ctx:
            found = run_paths(ctx)
    except AssertionError:  # a model that needs flash attention has no context without
        found = flash
    with np.errstate(invalid="ignore"):
        return found, max(deviation(flash[path], found[path]) for path in found)


def test_the_table_has_all(repo_root: Path, tmp_path: Path) -> None:
    """Models that come with another llama.cpp are to be looked at."""
    assert sorted(run_program(repo_root, tmp_path)) == sorted(ARCHS)
    for path in tmp_path.glob("*.gguf"):
        path.unlink()
    assert {name.removesuffix("-moe") for name in HELD} == TESTED


@pytest.mark.parametrize("name", HELD)
def test_equals_the_plain_cache(name: str, arch: Make) -> None:
    with loaded(arch(name)) as one:
        expected, noise = plain(one.model)
        for fused in (True, False) if name in SAMPLES else (True,):
            with open_context(one.model, xkv=one.bases.params(fused=fused)) as ctx:
                found = run_paths(ctx)
                parts = dict(native.report(ctx.ptr))
                assert native.seq_tokens(ctx.ptr, 0)[1] >= 64
            assert (parts["V coefficients"] == 0) == (name in LATENTS)
            assert ("windowed layers" in parts) == (ARCHS[name] == WINDOWED)
            assert ("recurrent state" in parts) == (ARCHS[name] == HYBRID)
            for path in expected:
                if name.startswith("llama-embed"):  # has no logits
                    assert not expected[path].any() and not found[path].any()
                else:
                    assert deviation(found[path], expected[path]) <= TOL_FLASH * noise + TOL_F32, path


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, arch: Make) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[name].replace("(", r"\(").replace(")", r"\)")) as caught:
        file_shape(arch(name))
    assert name.removesuffix("-moe") in str(caught.value)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_store_is_in_use(name: str, arch: Make) -> None:
    """At a low rank the logits move, after the window's tokens only."""
    with loaded(arch(name)) as one:
        with open_context(one.model, xkv=one.bases.params()) as ctx:
            full = ctx.feed(TOKENS, 50)
        with open_context(one.model, xkv=one.bases.params(rank=32)) as ctx:
            low = ctx.feed(TOKENS, 50)
    assert deviation(low[200:], full[200:]) > 5e-3
    assert deviation(low[:100], full[:100]) <= TOL_F32


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", SAMPLES)
def test_sequences(name: str, unified: bool, arch: Make) -> None:
    """Two sequences side by side equal each alone."""
    texts = TOKENS[:200], TOKENS[50:]
    with loaded(arch(name)) as one:
        alone = []
        for text in texts:
            with open_context(one.model, xkv=one.bases.params()) as ctx:
                alone.append(ctx.feed(text, 50))
        with open_context(one.model, n_ctx=1024, n_seq_max=2, unified=unified, xkv=one.bases.params()) as ctx:
            both = [ctx.decode((0, texts[0][i : i + 20]), (1, texts[1][i : i + 20])) for i in range(0, 200, 20)]
    for seq in (0, 1):
        found = np.concatenate([part[20 * seq : 20 * (seq + 1)] for part in both])
        assert deviation(found, alone[seq]) <= 10 * TOL_F32, seq


@pytest.mark.parametrize("name", SAMPLES)
def test_a_prefix_is_used_again(name: str, arch: Make) -> None:
    """After a cut the cache goes on as if it had read nothing else; a recurrent state says that it cannot be cut."""
    with loaded(arch(name)) as one, open_context(one.model, xkv=one.bases.params()) as ctx:
        first = ctx.feed(TOKENS, 50)
        if ARCHS[name] == HYBRID:
            assert not ctx.seq_rm(0, 220)
            assert ctx.seq_rm(0, 0)
            assert deviation(ctx.feed(TOKENS, 50), first) <= TOL_F32
            return
        assert ctx.seq_rm(0, 235)
        ctx.feed(TOKENS[:10], 10)
        assert ctx.seq_rm(0, 235)
        assert deviation(ctx.feed(TOKENS[235:], 15), first[235:]) <= TOL_F32


def test_the_docs_tell_the_same(repo_root: Path) -> None:
    written = subprocess.run(
        [sys.executable, "-c", "import models_table; print(models_table.document(), end='')"],
        cwd=repo_root / "docs" / "scripts",
        capture_output=True,
        text=True,
        check=True,
    )
    assert (repo_root / "docs" / "models.md").read_text() == written.stdout, "python docs/scripts/models_table.py"


@pytest.mark.parametrize("name", ["gemma2", "gemma3n", "gemma4", "gpt-oss-moe"])
def test_a_cut_that_windows_have_forgotten(name: str, arch: Make) -> None:
    """Windowed layers hold 256 tokens here and look back 32: a cut to where they lack those is refused."""
    tokens = TOKENS * 2
    with loaded(arch(name)) as one:
        with open_context(one.model, xkv=one.bases.params()) as ctx:
            expected = ctx.feed(tokens, 50)
        with open_context(one.model, swa_full=False, xkv=one.bases.params()) as ctx:
            ctx.feed(tokens, 50)
            assert not ctx.seq_rm(0, 200)
            assert sum(native.seq_tokens(ctx.ptr, 0)) == 500
            assert ctx.seq_rm(0, 480)
            assert deviation(ctx.feed(tokens[480:], 10), expected[480:]) <= 10 * TOL_F32


def test_a_cut_of_all_sequences_is_one_of_all_or_none(arch: Make) -> None:
    """Where one of them has forgotten what the cut needs, the others keep their tokens."""
    with (
        loaded(arch("gemma3")) as one,
        open_context(one.model, n_ctx=1024, n_seq_max=2, unified=False, swa_full=False, xkv=one.bases.params()) as ctx,
    ):
        for seq, n in ((0, 40), (1, 500)):
            ctx.feed((TOKENS * 2)[:n], 50, seq)
        assert not ctx.seq_rm(-1, 30)
        assert [sum(native.seq_tokens(ctx.ptr, seq)) for seq in range(2)] == [40, 500]


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("name", SAMPLES)
def test_positions_shift(name: str, swa_full: bool, arch: Make) -> None:
    """As in llama.cpp's own memory, windowed layers and recurrent state with it, or refused in one line."""
    tokens = TOKENS * 2
    with (
        loaded(arch(name)) as one,
        open_context(one.model, swa_full=swa_full, xkv=one.bases.params(n_absorb=64)) as ctx,
    ):
        ctx.feed(tokens[:200], 8)
        if not lib.llama_memory_can_shift(ctx.memory):
            assert name in FIXED or (ARCHS[name] == WINDOWED and not swa_full)
            lib.llama_memory_seq_add(ctx.memory, 0, 0, -1, 3)
            why = "M-RoPE" if name in FIXED else "set swa_full"
            assert why in str(native.take_refusal(ctx.ptr))
            lib.llama_memory_clear(ctx.memory, True)
            ctx.n_past.clear()
            ctx.feed(tokens[:8], 8)
            return
        assert name not in FIXED
        with open_context(one.model, flash_attn=False) as expected:
            expected.feed(tokens[:200], 8)
            for both in (expected, ctx):
                if ARCHS[name] == HYBRID:  # a recurrent state forgets nothing
                    lib.llama_memory_seq_add(both.memory, 0, 0, -1, 30)
                else:
                    assert both.seq_rm(0, 10, 100)
                    lib.llama_memory_seq_add(both.memory, 0, 100, -1, -90)
                both.n_past[0] = lib.llama_memory_seq_pos_max(both.memory, 0) + 1
            assert deviation(ctx.feed(tokens[200:240], 8), expected.feed(tokens[200:240], 8)) <= 10 * TOL_F32


@pytest.mark.parametrize("name", SAMPLES)
def test_a_state_goes_on(name: str, arch: Make) -> None:
    """Saved and loaded into a new context, windowed layers and recurrent state with it."""
    with loaded(arch(name)) as one:
        with open_context(one.model, xkv=one.bases.params()) as ctx:
            ctx.feed(TOKENS[:200], 50)
            state = save(ctx)
            expected = ctx.feed(TOKENS[200:], 5)
        with open_context(one.model, xkv=one.bases.params()) as ctx:
            ctx.feed(TOKENS[50:90], 20)
            assert load(ctx, state), native.last_error()
            ctx.n_past[0] = 200
            assert deviation(ctx.feed(TOKENS[200:], 5), expected) <= 10 * TOL_F32


@pytest.mark.parametrize(("p0", "p1"), [(0, 150), (70, 150), (130, -1)])
def test_a_part_is_copied_between_streams(p0: int, p1: int, arch: Make) -> None:
    """Windowed layers are copied whole, and forget what was not asked for."""
    shape = {"n_ctx": 1024, "n_seq_max": 2}
    with (
        loaded(arch("gemma4")) as one,
        open_context(one.model, flash_attn=False, **shape) as expected,
        open_context(one.model, xkv=one.bases.params(n_absorb=64), **shape) as ctx,
    ):
        for both in (expected, ctx):
            both.feed(TOKENS[:200], 8)
        lib.llama_memory_seq_cp(ctx.memory, 0, 1, p0, p1)
        lib.llama_memory_seq_cp(expected.memory, 0, 1, -1, -1)
        assert expected.seq_rm(1, 0, p0) or p0 == 0
        assert p1 < 0 or expected.seq_rm(1, p1)
        for both in (expected, ctx):
            both.n_past[1] = 200 if p1 < 0 else p1
        for seq in (1, 0):
            found = ctx.feed(TOKENS[200:240], 8, seq)
            assert deviation(found, expected.feed(TOKENS[200:240], 8, seq)) <= 10 * TOL_F32


def test_a_recurrent_state_is_not_copied_in_part(arch: Make) -> None:
    with (
        loaded(arch("qwen35")) as one,
        open_context(one.model, n_ctx=1024, n_seq_max=2, xkv=one.bases.params()) as ctx,
    ):
        ctx.feed(TOKENS[:200], 50)
        lib.llama_memory_seq_cp(ctx.memory, 0, 1, 0, 150)
        assert "a recurrent state cannot be copied as it was before its last token" in str(native.take_refusal(ctx.ptr))


def test_a_shift_is_saved(arch: Make) -> None:
    """K of windowed layers, which llama.cpp turns with its next batch, is turned in the state."""
    with loaded(arch("gemma4")) as one:
        with open_context(one.model, xkv=one.bases.params()) as ctx:
            ctx.feed(TOKENS[:200], 50)
            assert ctx.seq_rm(0, 10, 100)
            lib.llama_memory_seq_add(ctx.memory, 0, 100, -1, -90)
            ctx.n_past[0] = 110
            state = save(ctx)
            expected = ctx.feed(TOKENS[200:], 5)
        with open_context(one.model, xkv=one.bases.params()) as ctx:
            assert load(ctx, state), native.last_error()
            ctx.n_past[0] = 110
            assert deviation(ctx.feed(TOKENS[200:], 5), expected) <= 10 * TOL_F32
