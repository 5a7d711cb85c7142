"""What goes wrong inside an operation of the cache is told, and does not end the process."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from xkv_gguf.errors import SidecarError
from xkv_gguf.runtime import native

from . import harness
from .conftest import Tiny
from .harness import Context, lib, open_context

N_BATCH = 64


def clear(ctx: Context) -> None:
    lib.llama_memory_clear(ctx.memory, True)


def remove_all(ctx: Context) -> None:
    lib.llama_memory_seq_rm(ctx.memory, -1, -1, -1)


def remove_one(ctx: Context) -> None:
    lib.llama_memory_seq_rm(ctx.memory, 0, 0, -1)


def truncate(path: Path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])


def other_bases(path: Path, data: bytes) -> None:
    path.write_bytes(data[:-4096] + bytes(4096))


@pytest.mark.parametrize("damage", [truncate, other_bases])
@pytest.mark.parametrize("act", [clear, remove_all, remove_one])
def test_a_sidecar_that_changes_while_it_is_in_use(
    act: Callable[[Context], None],
    damage: Callable[[Path, bytes], None],
    tiny: Callable[[str], Tiny],
    tokens: list[int],
    tmp_path: Path,
) -> None:
    """Calibrated bases are read again where a cache begins anew: then that fails, and decoding until it succeeds."""
    one = tiny("llama")
    bases = one.bases(4, 32)
    path = Path(shutil.copy(bases.path, tmp_path / "s.xkv.gguf"))
    # half of the directions: bases are renewed, so that the calibrated ones have to come back
    params = replace(bases.params(rank=64, online=True, n_prior=1), sidecar=str(path))
    with open_context(one.model, n_ctx=1024, xkv=params) as ctx:
        ctx.feed(tokens[:600], N_BATCH)
        assert native.online_info(ctx.ptr, 0).n_update > 0
        data = path.read_bytes()
        damage(path, data)
        act(ctx)
        refusal = native.take_refusal(ctx.ptr)
        assert isinstance(refusal, SidecarError)
        assert re.search(r"s\.xkv\.gguf: it was written to while it is in use.*; clear the cache", str(refusal))
        ctx.n_past.clear()
        with pytest.raises(AssertionError, match="llama_decode returned -2"):
            ctx.decode((0, tokens[:1]))


def test_a_sidecar_that_is_replaced_stays_open(tiny: Callable[[str], Tiny], tokens: list[int], tmp_path: Path) -> None:
    """As convert does: a new file under the old name."""
    one = tiny("llama")
    bases = one.bases(4, 32)
    path = Path(shutil.copy(bases.path, tmp_path / "s.xkv.gguf"))
    with open_context(one.model, n_ctx=1024, xkv=replace(bases.params(), sidecar=str(path))) as ctx:
        expected = ctx.feed(tokens[:200], N_BATCH)
        other = tmp_path / "other"
        other.write_bytes(b"something else")
        other.replace(path)
        clear(ctx)
        ctx.n_past.clear()
        assert (ctx.feed(tokens[:200], N_BATCH) == expected).all()


def test_what_was_refused_is_over_when_all_tokens_are_gone(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    with open_context(one.model, xkv=one.bases().params()) as ctx:
        expected = ctx.feed(tokens[:200], N_BATCH)
        lib.llama_memory_seq_add(ctx.memory, 0, 50, -1, -10)
        remove_all(ctx)
        assert native.take_refusal(ctx.ptr) is None
        ctx.n_past.clear()
        assert (ctx.feed(tokens[:200], N_BATCH) == expected).all()


def test_sequences_that_do_not_exist(tiny: Callable[[str], Tiny]) -> None:
    one = tiny("llama")
    with open_context(one.model, xkv=one.bases().params()) as ctx:
        for seq in (-1, 1, 1000):
            assert lib.llama_memory_seq_pos_min(ctx.memory, seq) == -1
            assert lib.llama_memory_seq_pos_max(ctx.memory, seq) == -1


@pytest.mark.parametrize("sizes", [{"n_keep": 32}, {"n_cell": 96}, {"n_slot": 256}, {"n_keep": 999}])
def test_sizes_that_do_not_hold_the_context(
    sizes: dict[str, int], tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan chooses sizes, the library checks them."""
    one = tiny("llama")
    right = harness.places
    monkeypatch.setattr(harness, "places", lambda *args: right(*args) | sizes)
    with pytest.raises(AssertionError, match=next(iter(sizes))), open_context(one.model, xkv=one.bases().params()):
        pass
