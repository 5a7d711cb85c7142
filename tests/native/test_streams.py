"""What is predicted for several sequences is what is allocated, and a ratio counts it all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import EMBD_KV, N_LAYER
from xkv_gguf import XkvOptions
from xkv_gguf.errors import OptionError
from xkv_gguf.model.file import ModelFile, open_model
from xkv_gguf.opening import Planned, scope_params
from xkv_gguf.plan.sizes import transit_bytes
from xkv_gguf.plan.stages import TENSOR_PAD
from xkv_gguf.runtime import native
from xkv_gguf.runtime.shape import file_shape
from xkv_gguf.sidecar.read import read_sidecar

from . import harness
from .sidecars import write_random

N_UBATCH = 64
WINDOWS = {"f16": harness.GGML_F16, "q8_0": harness.GGML_Q8_0, "f32": harness.GGML_F32}
SHAPES = [(1, False), (1, True), (4, False), (4, True), (16, False), (16, True)]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Iterator[Any]:
    model = harness.open_model(tiny_model)
    yield model
    harness.close_model(model)


@pytest.fixture(scope="module")
def model_file(tiny_model: Path) -> ModelFile:
    return open_model(tiny_model)


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "tiny.xkv.gguf"
    return write_random(path, N_LAYER, (EMBD_KV, EMBD_KV), 2, 32).path


def opened(loaded: Any, planned: Planned, n_ctx: int) -> Any:
    layout = planned.plan.layout
    return harness.open_context(
        loaded,
        n_ctx=n_ctx,
        n_ubatch=layout.n_ubatch,
        n_seq_max=layout.n_seq_max,
        unified=layout.kv_unified,
        window=WINDOWS[layout.type_window],
        xkv=planned.params,
    )


def close(found: dict[str, int], expected: dict[str, int], n_tensor: int) -> None:
    """The same bytes, but for what aligns tensors."""
    assert found.keys() == expected.keys()
    for name, n_bytes in expected.items():
        assert 0 <= found[name] - n_bytes <= n_tensor * TENSOR_PAD, (name, found, expected)


@pytest.mark.parametrize(("n_seq_max", "unified"), SHAPES)
@pytest.mark.parametrize("n_ctx", [4096, 5000])
def test_predicted_bytes_are_allocated(
    n_ctx: int, n_seq_max: int, unified: bool, loaded: Any, model_file: ModelFile, side: Path
) -> None:
    options = XkvOptions(coef_ratio=5, online=False, n_text_sink=20)
    planned = scope_params(
        read_sidecar(side), options, n_ctx, N_UBATCH, model_file, n_seq_max=n_seq_max, kv_unified=unified
    )
    plan = planned.plan
    assert not plan.stages or plan.layout.n_stream == 1
    with opened(loaded, planned, n_ctx) as ctx:
        close(dict(native.report(ctx.ptr)), dict(plan.parts), 3 * N_LAYER)
        assert dict(native.scratch(ctx.ptr))["micro-batch in transit"] == transit_bytes(
            file_shape(model_file.path), plan.layout
        )
        assert harness.lib.llama_n_ctx(ctx.ptr) == plan.layout.n_ctx
        assert harness.lib.llama_n_ctx_seq(ctx.ptr) == plan.layout.n_ctx_seq
    with harness.open_context(loaded, n_ctx=n_ctx, n_seq_max=n_seq_max, unified=unified, exact=False) as ctx:
        assert sum(dict(native.report(ctx.ptr)).values()) == plan.f16_bytes


@pytest.mark.parametrize(("n_seq_max", "unified"), SHAPES)
@pytest.mark.parametrize("ratio", [2.0, 5.0])
def test_a_ratio_is_held_or_refused(
    ratio: float, n_seq_max: int, unified: bool, loaded: Any, model_file: ModelFile, side: Path
) -> None:
    n_ctx = 16384
    options = XkvOptions(ratio=ratio, online=False)
    try:
        planned = scope_params(
            read_sidecar(side), options, n_ctx, N_UBATCH, model_file, n_seq_max=n_seq_max, kv_unified=unified
        )
    except OptionError as error:
        text = str(error)
        assert ratio == 5.0 and n_seq_max == 16
        where = "one stream" if unified else "streams of their own"
        assert f"ratio 5: out of reach at n_ctx 16384 for 16 sequences in {where}; the smallest cache" in text
        assert text.endswith("a larger n_ctx or a smaller n_seq_max than 16 helps")
        assert "\n" not in text
        return
    assert ratio <= planned.plan.ratio
    with opened(loaded, planned, n_ctx) as ctx:
        allocated = sum(dict(native.report(ctx.ptr)).values())
    assert 0.99 * ratio <= planned.plan.f16_bytes / allocated


def test_bases_of_every_stream_are_predicted(loaded: Any, model_file: ModelFile) -> None:
    """Without calibration, each stream learns its own from its first tokens."""
    options = XkvOptions(calibrate=False, coef_ratio=5, group_size=2, n_prior=0)
    planned = scope_params(None, options, 2048, N_UBATCH, model_file, n_seq_max=4)
    parts = dict(planned.plan.parts)
    tokens = [3 + i * 7 % 250 for i in range(400)]
    with opened(loaded, planned, 2048) as ctx:
        before = dict(native.report(ctx.ptr))["bases and means"]
        for seq in range(4):
            ctx.feed([(t + seq) % 250 for t in tokens], N_UBATCH, seq, last_only=True)
        after = dict(native.report(ctx.ptr))
        assert all(native.online_info(ctx.ptr, seq).n_update > 0 for seq in range(4))
    assert before < 0.5 * parts["bases and means"]
    close(after, parts, 3 * N_LAYER * 5)
