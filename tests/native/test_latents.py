"""Latents (MLA): V is the first numbers of K, so that K's coefficients serve both and there is no store of V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from xkv_gguf.convert.capture import Capture
from xkv_gguf.errors import OptionError
from xkv_gguf.plan.segments import Segment
from xkv_gguf.runtime import native
from xkv_gguf.runtime.shape import model_shape

from .conftest import Tiny
from .harness import GGML_Q8_0, open_context
from .sidecars import N_SINK, write_random
from .state import load, save
from .test_full_rank import TOL_F32, TOL_FLASH, deviation, run_paths
from .test_segments import error
from .test_stages import N_CTX, params
from .tiny_models import MODELS, N_HEAD, N_LATENT, N_LAYER, N_ROT

NAME = "deepseek2"


def test_sizes_that_are_told(tiny: Callable[[str], Tiny]) -> None:
    shape = model_shape(tiny(NAME).model)
    assert (shape.embd_k, shape.embd_v) == ((N_LATENT + N_ROT,) * N_LAYER, (0,) * N_LAYER)
    assert (shape.head_k, shape.head_v, shape.n_head(0)) == (N_LATENT + N_ROT, N_LATENT, N_HEAD)


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_is_stored_of_v(fused: bool, tiny: Callable[[str], Tiny]) -> None:
    """And attention is made of stock ops, which the devices tell."""
    one = tiny(NAME)
    with open_context(one.model, xkv=one.bases(2, 32).params(fused=fused)) as ctx:
        parts = dict(native.report(ctx.ptr))
        api = native.native()
        count = api.ffi.new("uint32_t *", 8)
        devices = api.ffi.new("struct xkv_device_part[]", 8)
        native.check_status(api.lib.xkv_context_devices(api.context(ctx.ptr), devices, count))
    dim = 2 * (N_LATENT + N_ROT)
    assert parts["V coefficients"] == 0
    assert parts["K coefficients"] == N_LAYER // 2 * 4 * dim * 512  # f32, of slots
    means = 4 * N_LAYER * (N_LATENT + N_ROT)
    assert parts["bases and means"] == N_LAYER * 4 * dim * (N_LATENT + N_ROT) + means
    assert [(d.n_layer, d.n_fused) for d in devices[0 : count[0]] if d.n_layer] == [(N_LAYER, 0)]


@pytest.mark.parametrize("rank", [32, 64, None])
def test_paths_agree(rank: int | None, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny(NAME)
    logits = []
    for n_absorb in (8, 0):
        with open_context(one.model, xkv=one.bases().params(rank=rank, n_absorb=n_absorb)) as ctx:
            logits.append(ctx.feed(tokens[:400], 8))
    noise = []
    for flash_attn in (False, True):
        with open_context(one.model, exact=False, flash_attn=flash_attn) as ctx:
            noise.append(ctx.feed(tokens[:400], 8))
    assert deviation(*logits) <= 2 * TOL_FLASH * deviation(*noise)


@pytest.mark.parametrize("n_absorb", [8, 0])
def test_error_falls_with_bits_and_directions(n_absorb: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny(NAME)
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:400], 8)

    def found(types: tuple[tuple[int, str], ...]) -> float:
        with open_context(one.model, xkv=one.bases(2, 128).params(types=types, n_absorb=n_absorb)) as ctx:
            return error(ctx.feed(tokens[:400], 8), plain)

    by_type = [found(((192, name),)) for name in ("q8_0", "q5_0", "q4_0")]
    assert by_type == sorted(by_type)
    several, fewer = found(((64, "q8_0"), (64, "q5_0"), (64, "q4_0"))), found(((64, "q8_0"), (64, "q5_0")))
    assert by_type[0] < several < by_type[2] < fewer


@pytest.mark.parametrize("how", ["static", "online", "cold"])
@pytest.mark.parametrize("plain", [False, True])
def test_stages(plain: bool, how: str, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """The full-rank invariant through changes of stage, a plain one among them."""
    one = tiny(NAME)
    # without calibration, as many tokens as there are directions have to leave first
    bases = one.bases(2, 256 if how == "cold" else 32)
    full = ((192, "f32"),)
    stages = {256: "f32" if plain else full, 512: full}
    given = params(bases, full, stages, online=how != "static", calibrated=how != "cold")
    for n_batch in (8, 64):
        found = []
        for kind in ({"flash_attn": False}, {"exact": False}, {"xkv": given}):
            with open_context(one.model, n_ctx=N_CTX, **kind) as ctx:
                found.append(ctx.feed(tokens[:900], n_batch))
                if "xkv" in kind:
                    info = native.online_info(ctx.ptr, 0)
                    assert (info.n_check >= 2) == (how != "static")
        expected, flash, xkv = found
        assert deviation(xkv, expected) <= TOL_FLASH * deviation(flash, expected) + TOL_F32


def test_renewed_bases_lose_less(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny(NAME)
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:200], 8)[180:]
    errors = []
    for online in (False, True):
        with open_context(one.model, xkv=one.bases(4, 32).params(rank=64, online=online, n_prior=0)) as ctx:
            errors.append(error(ctx.feed(tokens[:200], 8)[180:], plain))
            assert (native.online_info(ctx.ptr, 0).n_update > 0) == online
    assert errors[1] < errors[0]


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("unified", [False, True])
def test_sequences(online: bool, unified: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Of different lengths, in one stream and in their own, before and after a removal that cuts a chunk."""
    one = tiny(NAME)
    found = []
    for xkv in (None, one.bases(2, 32).params(online=online, n_prior=100)):
        with open_context(
            one.model, n_ctx=1536, n_seq_max=3, unified=unified, xkv=xkv, flash_attn=xkv is not None
        ) as ctx:
            rows = [ctx.feed(tokens[100 * seq : 100 * seq + n], 8, seq) for seq, n in enumerate((300, 20, 170))]
            rows += [ctx.decode(*((s, tokens[9 * i + s :][:1]) for s in range(3))) for i in range(8)]
            assert ctx.seq_rm(0, 101)
            rows += [ctx.decode(*((s, tokens[9 * i + s :][:1]) for s in range(3))) for i in range(8)]
            found.append(np.concatenate(rows))
    assert deviation(found[1], found[0]) <= TOL_F32


@pytest.mark.parametrize("n_token", [200, 400, 800])
@pytest.mark.parametrize("online", [False, True])
def test_saved_states(online: bool, n_token: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """In every stage, what is loaded goes on as what was saved."""
    one = tiny(NAME)
    stages = {256: "q8_0", 512: ((384, "q4_0"),)}
    xkv = params(one.bases(4, 64), ((64, "q8_0"), (256, "q2_0")), stages, online=online)
    with open_context(one.model, n_ctx=N_CTX, xkv=xkv) as ctx:
        ctx.feed(tokens[:n_token], 50)
        state = save(ctx)
        expected = ctx.feed(tokens[n_token : n_token + 20], 1)
    with open_context(one.model, n_ctx=N_CTX, xkv=xkv) as ctx:
        ctx.feed(tokens[300:700], 50)
        assert load(ctx, state), native.last_error()
        ctx.n_past[0] = n_token
        assert save(ctx) == state
        assert deviation(ctx.feed(tokens[n_token : n_token + 20], 1), expected) <= 50 * TOL_F32


def test_a_q8_0_window(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny(NAME)
    found = []
    for kind in ({"flash_attn": False}, {"window": GGML_Q8_0}, {"window": GGML_Q8_0, "xkv": one.bases().params()}):
        with open_context(one.model, **kind) as ctx:
            found.append(run_paths(ctx, tokens))
    for path, plain in found[0].items():
        assert error(found[2][path], plain) <= 1.5 * error(found[1][path], plain) + 1e-3, path


def test_text_sinks(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """What has next to no V, the first numbers of K, stays exact; here nothing else does."""
    one = tiny(NAME)
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:400], 8)
    with open_context(one.model, xkv=one.bases().params(n_text_sink=16)) as ctx:
        assert deviation(ctx.feed(tokens[:400], 8), plain) <= TOL_F32
        assert native.seq_tokens(ctx.ptr, 0)[1] % 32 == 0


def test_other_sidecars_are_refused(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """One with V, segments of V, and a sidecar of latents where the model keeps V."""
    one, kind = tiny(NAME), MODELS[NAME]
    with_v = write_random(tmp_path / "v", N_LAYER, (kind.embd_k, N_LATENT), 2, 32)
    mismatch = f"has {kind.embd_k} and {N_LATENT} numbers for K and V of layer 0, the model has {kind.embd_k} and 0"
    with pytest.raises(AssertionError, match=mismatch), open_context(one.model, xkv=with_v.params()):
        pass
    given = one.bases(2, 32).params()
    more = replace(given, segments=(*given.segments, Segment(0, "v", 32, "f32", "f32")))
    with (
        pytest.raises(AssertionError, match="1 segments for V of group 0, expected none"),
        open_context(one.model, xkv=more),
    ):
        pass
    without = write_random(tmp_path / "k", N_LAYER, (32, 0), 2, 32)
    with (
        pytest.raises(AssertionError, match="has 32 and 0 numbers"),
        open_context(tiny("llama").model, xkv=without.params()),
    ):
        pass
    cold = tiny("llama").bases().params(online=True, calibrated=False)
    cold = replace(cold, segments=tuple(s for s in cold.segments if s.kind == "k"))
    with (
        pytest.raises(AssertionError, match="0 segments for V of group 0, expected at least one"),
        open_context(tiny("llama").model, xkv=cold),
    ):
        pass


def test_capture_of_k_alone(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """K can be exchanged in the cache, and V with it; V by itself is refused."""
    one = tiny(NAME)
    dims = {"k": [N_LATENT + N_ROT, 2 * (N_LATENT + N_ROT)], "v": [0, 0]}
    with open_context(one.model, exact=False) as ctx:
        ctx.feed(tokens[:300], 64)
        with Capture(SimpleNamespace(context_pointer=ctx.ptr), [[0], [1, 2]], dims, 32, N_SINK) as capture:
            capture.add(0)
            before = ctx.decode((0, tokens[300:310]))
            ctx.seq_rm(0, 300)
            for group in (0, 1):
                x, sums = capture.get(0, group, "k", N_SINK, 300 - N_SINK), capture.read(group, "k")
                np.testing.assert_allclose(x.sum(0), sums.total, rtol=1e-3, atol=1e-2)
                np.testing.assert_allclose(x.T @ x, sums.gram, rtol=2e-3, atol=1e-3 * np.abs(sums.gram).max())
                changed = x.copy()
                changed[50:150, :N_LATENT] += 1.0
                capture.put(0, group, "k", N_SINK, changed)
                other = ctx.decode((0, tokens[300:310]))
                ctx.seq_rm(0, 300)
                assert np.abs(other - before).max() > 1e-2
                capture.put(0, group, "k", N_SINK, x)
                for ask in (
                    lambda g=group: capture.read(g, "v"),
                    lambda g=group: capture.get(0, g, "v", N_SINK, 8),
                    lambda g=group: capture.drop(g, "v"),
                ):
                    with pytest.raises(OptionError, match=r"V of group . is a part of K"):
                        ask()
