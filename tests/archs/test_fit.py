"""What is said of a context is what it allocates: plain, hybrid, windowed models, those with sinks or latents."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf import Llama, XkvOptions
from xkv_gguf.fitting import Fitting, Kind
from xkv_gguf.model.file import open_model
from xkv_gguf.runtime.devices import context_devices

Make = Callable[[str], Path]

XKV: dict[str, Any] = {"ratio": 3, "calibrate": False}
CACHES = [
    Kind("f16"),
    Kind("q8_0"),
    Kind("q4_0"),
    Kind("xkv", XkvOptions(**XKV)),
    Kind("xkv", XkvOptions(**XKV, fused=False)),
]


def opened(path: Path, kind: Kind, n_ctx: int) -> Llama:
    options = kind.options if kind.kv_mode == "xkv" else None
    return Llama(path, kv_mode=kind.kv_mode, xkv=options, n_ctx=n_ctx, n_threads=1, n_threads_batch=1, verbose=False)


@pytest.mark.parametrize("name", ["llama", "qwen35", "gemma3", "gpt-oss-moe", "granitehybrid", "deepseek2-moe"])
def test_sizes_are_those_that_are_allocated(name: str, arch: Make) -> None:
    path = arch(name)
    with Fitting(open_model(path), {}) as fitting:
        for n_ctx in (2048, 6144):
            for kind in CACHES:
                found = kind.context(fitting, n_ctx)
                llm = opened(path, kind, n_ctx)
                report = llm.kv_report()
                weights = sum(part.weights for part in context_devices(llm._ctx.ctx))
                llm.close()
                assert dict(found.sizes.parts) == {part.name: part.bytes for part in report.parts}
                assert found.taken.cache == report.total_bytes
                assert found.taken.compute == pytest.approx(report.scratch_bytes, rel=0.01)
                assert found.taken.weights == pytest.approx(weights, rel=0.01)
                beside = {"windowed layers", "recurrent state"} & set(found.sizes.parts)
                assert bool(beside) == (kind.kv_mode == "xkv" and name not in ("llama", "deepseek2-moe"))


def test_nothing_large_is_allocated(arch: Make) -> None:
    with Fitting(open_model(arch("llama")), {}) as fitting:
        CACHES[3].context(fitting, 2048)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = CACHES[3].context(fitting, 1 << 20)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert found.taken.cache > 600 << 20
    assert (after - before) << 10 < 100 << 20
