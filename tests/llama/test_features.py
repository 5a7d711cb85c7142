"""What a context of llama.cpp can do beside answering, on an xkv cache that loses nothing: as on a plain one."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp.llama_grammar import LlamaGrammar

from tests.tiny import HEAD, N_EMBD, N_HEAD, N_LAYER
from xkv_gguf import Llama
from xkv_gguf.convert.pipeline import convert
from xkv_gguf.convert.settings import Settings

from .tiny_models import write_adapter

EXACT = {
    "online": False,
    "rank": "full",
    "types": "f32",
    "type_window": "f32",
    "type_basis": "f32",
    "tolerance": 0.0,
    "n_window": 64,
}
N_CTX = 2048
TOKENS = [3 + (i * i * 7 + i // 3) % 256 for i in range(700)]
CLOSE = 0.06  # f16 and flash attention of the plain cache

Logits = npt.NDArray[np.float32]


@contextmanager
def opened(mode: str, model: Path, **kwargs: Any) -> Iterator[Any]:
    settings: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": 1, "verbose": False, **kwargs}
    if mode == "xkv":
        sidecar = model.with_suffix(".exact")
        if not sidecar.exists():
            convert(model, sidecar, Settings(tokens=2048, threads=1, weigh="none"), show_progress=False)
        llm: Any = Llama(model, xkv={**EXACT, "sidecar": str(sidecar)}, **settings)
    else:  # exact: f32, without flash attention
        llm = llama_cpp.Llama(str(model), type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, **settings)
    try:
        yield llm
    finally:
        llm.close()


def logits(llm: Any) -> Logits:
    return np.array(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)), np.float32)


def read(llm: Any) -> Logits:
    """Logits after the tokens, of which most are stored in an xkv cache, and after single ones."""
    llm.eval(TOKENS)
    found = [logits(llm)]
    for token in TOKENS[:3]:
        llm.eval([token])
        found.append(logits(llm))
    if isinstance(llm, Llama) and llm.context_params.n_ubatch <= 512:
        assert llm.kv_report().n_stored > 300
    return np.array(found)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Logits:
    with opened("plain", tiny_model) as llm:
        return read(llm)


@pytest.mark.parametrize("n_ubatch", [1, 7, 512, 2048])
def test_micro_batches(n_ubatch: int, tiny_model: Path, plain: Logits) -> None:
    with opened("xkv", tiny_model, n_ubatch=n_ubatch, n_batch=2048) as llm:
        assert llm.context_params.n_ubatch == n_ubatch
        assert np.abs(read(llm) - plain).max() < CLOSE


@pytest.mark.parametrize("offload_kqv", [True, False])
@pytest.mark.parametrize("n_gpu_layers", [0, -1])
def test_offload_kqv(offload_kqv: bool, n_gpu_layers: int, tiny_model: Path, plain: Logits) -> None:
    with opened("xkv", tiny_model, offload_kqv=offload_kqv, n_gpu_layers=n_gpu_layers) as llm:
        assert np.abs(read(llm) - plain).max() < CLOSE


def set_adapter(llm: Any, folder: Path) -> Callable[[], None]:
    """Apply a LoRA adapter to an open context."""
    path = folder / "adapter.gguf"
    write_adapter(path, "llama", N_EMBD, N_HEAD * HEAD)
    adapter = llama_cpp.llama_adapter_lora_init(llm._model.model, str(path).encode())
    assert adapter
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (ctypes.c_float * 1)(0.5)
    assert llama_cpp.llama_set_adapters_lora(llm._ctx.ctx, adapters, 1, scales) == 0
    return lambda: llama_cpp.llama_adapter_lora_free(adapter)


def set_control_vector(llm: Any, _folder: Path) -> Callable[[], None]:
    """Add a direction to what each layer but the first gives."""
    data = np.random.default_rng(2).normal(0, 5, (N_LAYER - 1) * N_EMBD).astype(np.float32)
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama_cpp.llama_set_adapter_cvec(llm._ctx.ctx, pointer, data.size, N_EMBD, 1, N_LAYER) == 0
    return lambda: None


@pytest.mark.parametrize("change", [set_adapter, set_control_vector])
def test_what_changes_the_model_at_run_time(
    change: Callable[[Any, Path], Callable[[], None]], tiny_model: Path, tmp_path: Path, plain: Logits
) -> None:
    found = {}
    for mode in ("plain", "xkv"):
        with opened(mode, tiny_model) as llm:
            undo = change(llm, tmp_path)
            found[mode] = read(llm)
            undo()
    assert np.abs(found["plain"] - plain).max() > 20 * CLOSE
    assert np.abs(found["xkv"] - found["plain"]).max() < 4 * CLOSE


def test_an_adapter_that_is_given_at_first(tiny_model: Path, tmp_path: Path, plain: Logits) -> None:
    path = tmp_path / "adapter.gguf"
    write_adapter(path, "llama", N_EMBD, N_HEAD * HEAD)
    found = {}
    for mode in ("plain", "xkv"):
        with opened(mode, tiny_model, lora_path=str(path), lora_scale=0.5) as llm:
            found[mode] = read(llm)
    assert np.abs(found["plain"] - plain).max() > 20 * CLOSE
    assert np.abs(found["xkv"] - found["plain"]).max() < 4 * CLOSE


def test_embeddings_of_a_context_that_generates(tiny_model: Path, plain: Logits) -> None:
    """Switched on between two tokens, as llama.cpp's own programs do."""
    found = {}
    for mode in ("plain", "xkv"):
        with opened(mode, tiny_model) as llm:
            llm.eval(TOKENS)
            llama_cpp.llama_set_embeddings(llm._ctx.ctx, True)
            llm.eval(TOKENS[:1])
            found[mode] = np.array(llm._ctx.get_embeddings_ith(-1)[:N_EMBD])
            llama_cpp.llama_set_embeddings(llm._ctx.ctx, False)
            llm.eval(TOKENS[1:2])
            assert np.abs(logits(llm) - plain[2]).max() < CLOSE
    assert np.abs(found["plain"]).max() > 0.1
    assert np.abs(found["xkv"] - found["plain"]).max() < CLOSE


def test_logits_of_all_tokens_and_logprobs(tiny_model: Path) -> None:
    rows, told = {}, {}
    for mode in ("plain", "xkv"):
        with opened(mode, tiny_model, logits_all=True) as llm:
            llm.eval(TOKENS)
            rows[mode] = llm.scores[: len(TOKENS)].copy()
            reply: Any = llm(TOKENS, max_tokens=1, temperature=0.0, logprobs=5)
            told[mode] = reply["choices"][0]["logprobs"]["token_logprobs"]
    assert np.abs(rows["xkv"] - rows["plain"]).max() < 3 * CLOSE
    assert np.allclose(told["xkv"], told["plain"], atol=CLOSE)


def test_a_grammar(tiny_model: Path) -> None:
    grammar = 'root ::= ("a" | "b") [0-9]+ "."'
    for mode in ("plain", "xkv"):
        with opened(mode, tiny_model) as llm:
            rules = LlamaGrammar.from_string(grammar, verbose=False)
            reply: Any = llm(TOKENS, grammar=rules, max_tokens=8, temperature=0.0)
            assert re.fullmatch(r"[ab][0-9]+\.?", reply["choices"][0]["text"])
