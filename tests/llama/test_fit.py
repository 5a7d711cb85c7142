"""A memory as the size of a cache: the demo model stays within it, or says what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xkv_gguf import Llama, XkvOptions
from xkv_gguf.errors import OutOfMemoryError
from xkv_gguf.fitting import Context, Fitting
from xkv_gguf.model.file import open_model
from xkv_gguf.runtime.devices import context_devices

N_CTX = 4096
THREADS = min(2, os.cpu_count() or 1)
ALONE = {"calibrate": False}


def sized(model: Path, n_ctx: int = N_CTX, **options: object) -> Context:
    with Fitting(open_model(model), {}) as fitting:
        return fitting.xkv(XkvOptions.of({**ALONE, **options}), None, n_ctx)


def opened(model: Path, n_ctx: int = N_CTX, **options: object) -> Llama:
    xkv = {**ALONE, **options}
    return Llama(model, xkv=xkv, n_ctx=n_ctx, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)


def allocated(llm: Llama) -> int:
    report = llm.kv_report()
    weights = sum(part.weights for part in context_devices(llm._ctx.ctx))
    return weights + report.total_bytes + report.scratch_bytes


@pytest.mark.model
def test_sizes_are_those_that_are_allocated(demo_model: Path) -> None:
    for ratio in (4, 7):
        found = sized(demo_model, ratio=ratio)
        llm = opened(demo_model, ratio=ratio)
        there = allocated(llm)
        llm.close()
        assert found.taken.allocated == pytest.approx(there, rel=0.01)
    with Fitting(open_model(demo_model), {}) as fitting:
        for kv_mode in ("f16", "q8_0", "q4_0"):
            plain = Llama(demo_model, kv_mode=kv_mode, n_ctx=N_CTX, n_threads=THREADS, verbose=False)
            there = allocated(plain)
            plain.close()
            assert fitting.plain(kv_mode, N_CTX).taken.allocated == pytest.approx(there, rel=0.01)


@pytest.mark.model
@pytest.mark.slow
def test_renewals_stay_below_what_is_said(demo_model: Path) -> None:
    found = sized(demo_model, 1024, ratio=3)
    llm = opened(demo_model, 1024, ratio=3)
    llm.eval([token % llm.n_vocab() for token in range(7, 7 + 11 * 900, 11)])
    report = llm.kv_report()
    llm.close()
    assert report.n_update > 0
    peak = {part.name: part.bytes for part in report.scratch}["flush and renewals"]
    assert 0.1 * found.taken.renewals < peak <= found.taken.renewals
    assert report.scratch_bytes - peak == pytest.approx(found.taken.compute, rel=0.01)


@pytest.mark.model
def test_the_cache_takes_what_is_left(demo_model: Path) -> None:
    memory = sized(demo_model, ratio=6).taken.total
    llm = opened(demo_model, memory=memory)
    there = allocated(llm)
    plan = llm.xkv_plan
    llm.close()
    assert plan is not None and 5.5 < plan.ratio < 6.5
    assert there <= memory
    assert there + sized(demo_model, ratio=6).taken.renewals > 0.97 * memory


@pytest.mark.model
def test_a_large_memory_makes_no_large_cache(demo_model: Path) -> None:
    llm = opened(demo_model, memory="64GiB")
    plan = llm.xkv_plan
    llm.close()
    assert plan is not None and plan.ratio == pytest.approx(4, rel=0.03)


@pytest.mark.parametrize(
    "memory, expected",
    [
        ("100MiB", r"^memory 100\.0 MiB: [0-9.]+ MiB are taken without a cache \(weights 92\.1 MiB, all else .* raise"),
        (0, r"^memory [0-9.]+ MiB: [0-9.]+ [MK]iB are left for the cache at n_ctx 4096 beside .*the smallest cache"),
    ],
)
@pytest.mark.model
def test_a_memory_that_is_too_small(memory: str | int, expected: str, demo_model: Path) -> None:
    if memory == 0:
        found = sized(demo_model, ratio=8)
        assert found.plan is not None
        memory = found.taken.total - found.plan.total_bytes + (1 << 20)
    with pytest.raises(OutOfMemoryError, match=expected) as error:
        opened(demo_model, memory=memory)
    assert "\n" not in str(error.value)
