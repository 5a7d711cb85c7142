"""Calibration's sums of keys in chunk frames: RoPE turns the numbers that the model turns, and leaves the others."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from xkv_gguf.convert.capture import Capture
from xkv_gguf.errors import OptionError, UnsupportedError
from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import open_context
from .tiny_models import MODELS, N_LATENT, N_LAYER, N_ROT

N_SINK = 4


def grams(name: str, frame: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> np.ndarray:
    """Sums of products of a layer's keys [layer, KV head, number of a head, KV head, number of a head]."""
    kind = MODELS[name]
    dims = {"k": [kind.embd_k] * N_LAYER, "v": [kind.embd_v] * N_LAYER}
    with open_context(tiny(name).model, flash_attn=False) as ctx:
        ctx.feed(tokens[:400], 64)
        engine = SimpleNamespace(context_pointer=ctx.ptr)
        with Capture(engine, [[layer] for layer in range(N_LAYER)], dims, frame, N_SINK) as capture:
            capture.add(0)
            sums = [capture.read(il, "k") for il in range(N_LAYER)]
    assert {one.n_tokens for one in sums} == {400 - N_SINK}
    return np.stack([one.gram.reshape(kind.n_head_kv, kind.head_k, kind.n_head_kv, kind.head_k) for one in sums])


@pytest.mark.parametrize(
    ("name", "turned"),
    [
        ("llama-gqa", slice(0, 32)),
        ("stablelm", slice(0, 16)),
        ("minicpm3", slice(64 - N_ROT, 64)),
        ("deepseek2", slice(N_LATENT, N_LATENT + N_ROT)),
        ("gpt2", slice(0, 0)),
    ],
)
def test_frames_turn_what_the_model_turns(
    name: str, turned: slice, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    """The length of chunks changes the sums of all numbers that are turned, and of no others."""
    short, long = (grams(name, frame, tiny, tokens) for frame in (32, 64))
    same = np.ones(MODELS[name].head_k, bool)
    same[turned] = False
    np.testing.assert_array_equal(short[:, :, same][..., same], long[:, :, same][..., same])
    change = np.abs(short - long).max(axis=(0, 1, 3))  # [number, number] of a head
    # low frequencies turn little between two frames
    assert (change[~same].max(axis=1) > 1e-4 * np.abs(short).max()).all()


@pytest.mark.parametrize("name", ["llama-gqa", "stablelm", "gpt2"])
def test_what_is_taken_out_can_be_put_back(name: str, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """The sums are those of what is taken out; what is put in is found there, of those tokens alone, and counts."""
    kind = MODELS[name]
    dims = {"k": [kind.embd_k, 2 * kind.embd_k], "v": [kind.embd_v, 2 * kind.embd_v]}
    rng = np.random.default_rng(3)
    with open_context(tiny(name).model, exact=False) as ctx:
        ctx.feed(tokens[:300], 64)
        engine = SimpleNamespace(context_pointer=ctx.ptr)
        with Capture(engine, [[0], [1, 2]], dims, 32, N_SINK) as capture:
            capture.add(0)
            before = ctx.decode((0, tokens[300:310]))
            ctx.seq_rm(0, 300)
            for group in (0, 1):
                for side in ("k", "v"):
                    x, sums = capture.get(0, group, side, N_SINK, 300 - N_SINK), capture.read(group, side)
                    assert sums.n_tokens == len(x)
                    np.testing.assert_allclose(x.sum(0), sums.total, rtol=1e-3, atol=1e-2)
                    np.testing.assert_allclose(x.T @ x, sums.gram, rtol=2e-3, atol=1e-3 * np.abs(sums.gram).max())

                    part = x[50:150] + rng.normal(0, 2.0, x[50:150].shape).astype(np.float32)
                    capture.put(0, group, side, N_SINK + 50, part)
                    changed = x.copy()
                    changed[50:150] = part
                    found = capture.get(0, group, side, N_SINK, 300 - N_SINK)
                    np.testing.assert_allclose(found, changed, atol=4e-3 * np.abs(part).max())
                    other = ctx.decode((0, tokens[300:310]))
                    ctx.seq_rm(0, 300)
                    assert np.abs(other - before).max() > 1e-3
                    capture.put(0, group, side, N_SINK, x)
            again = ctx.decode((0, tokens[300:310]))
            assert np.abs(again - before).max() < 0.1 * np.abs(other - before).max()

            capture.drop(1, "v")
            assert capture.read(1, "v").n_tokens == 0 and not capture.read(1, "v").gram.any()
            assert capture.read(1, "k").n_tokens == 300 - N_SINK
            with pytest.raises(OptionError, match="sequence 0 holds 306 tokens from 4 on, expected 400"):
                capture.get(0, 0, "k", N_SINK, 400)
            with pytest.raises(OptionError, match="expected a sequence below"):
                capture.get(0, 0, "k", 0, 4)


def test_a_model_without_flash_attention_is_refused(tiny: Callable[[str], Tiny]) -> None:
    """Before a context aborts: PLM turns the end of its heads as well, but its values have too few dimensions."""
    with pytest.raises(UnsupportedError, match="architecture plm does not run with flash attention"):
        native.check_model(tiny("plm").model)
