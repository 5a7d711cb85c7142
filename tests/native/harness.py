"""Contexts of llama.cpp at the level of batches, with any cache, and bases made of random rotations."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from xkv_gguf.plan.sizes import CacheLayout, padded_ctx
from xkv_gguf.runtime import loader, log, native
from xkv_gguf.sidecar.read import read_sidecar

F32 = Any  # array of float32

loader.load()
log.silence()
lib: Any = importlib.import_module("llama_cpp")

GGML_F32 = 0
GGML_F16 = 1
GGML_Q8_0 = 8


def open_model(path: Path, on_devices: Sequence[int] = ()) -> Any:
    """Load a model, as many layers on each device as given, the output included; `close_model` frees it."""
    params = lib.llama_model_default_params()
    params.n_gpu_layers = sum(on_devices)
    split = (ctypes.c_float * lib.llama_max_devices())(*on_devices)
    if on_devices:
        params.tensor_split = split
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"{path} does not load"
    return model


def close_model(model: Any) -> None:
    lib.llama_model_free(model)


@dataclass
class Context:
    """A llama_context with what a test asks of it."""

    ptr: Any
    n_vocab: int
    n_past: dict[int, int] = field(default_factory=dict)

    @property
    def memory(self) -> Any:
        return lib.llama_get_memory(self.ptr)

    def decode(self, *parts: tuple[int, Sequence[int]], last_only: bool = False) -> F32:
        """Decode one batch of (sequence, tokens); returns logits [tokens of all parts, or 1, n_vocab]."""
        total = sum(len(tokens) for _, tokens in parts)
        batch = lib.llama_batch_init(total, 0, 1)
        batch.n_tokens = total
        i = 0
        for seq, tokens in parts:
            for token in tokens:
                batch.token[i] = token
                batch.pos[i] = self.n_past.get(seq, 0)
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = seq
                batch.logits[i] = not last_only or i == total - 1
                self.n_past[seq] = self.n_past.get(seq, 0) + 1
                i += 1
        code = lib.llama_decode(self.ptr, batch)
        lib.llama_batch_free(batch)
        assert code == 0, f"llama_decode returned {code}: {native.last_error()}"
        rows = 1 if last_only else total
        logits = np.ctypeslib.as_array(lib.llama_get_logits(self.ptr), shape=(rows * self.n_vocab,))
        return logits.reshape(rows, self.n_vocab).copy()

    def feed(self, tokens: Sequence[int], n_batch: int, seq: int = 0, last_only: bool = False) -> F32:
        """Decode tokens in batches of one sequence; returns all logits, or those of each batch's last token."""
        parts = [(seq, tokens[i : i + n_batch]) for i in range(0, len(tokens), n_batch)]
        return np.concatenate([self.decode(part, last_only=last_only) for part in parts])

    def seq_rm(self, seq: int, p0: int, p1: int = -1) -> bool:
        ok = bool(lib.llama_memory_seq_rm(self.memory, seq, p0, p1))
        if ok and p1 < 0:
            self.n_past[seq] = min(self.n_past.get(seq, 0), p0)
        return ok


def run_paths(ctx: Context, tokens: Sequence[int]) -> dict[str, F32]:
    """Logits of a prompt in micro-batches, of single tokens, and of batches between."""
    prompt = ctx.feed(tokens[:300], 64)
    single = ctx.feed(tokens[300:460], 1)
    few = ctx.feed(tokens[460:480], 5)
    many = ctx.feed(tokens[480:510], 30)
    return {"prompt": prompt, "single": single, "few": few, "many": many}


def deviation(found: F32, expected: F32) -> float:
    """Largest difference over the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def places(params: native.ScopeParams, n_ctx: int, n_ubatch: int, n_seq: int) -> dict[str, int]:
    """Sizes of window and store for a stream of `n_seq` sequences that holds `n_ctx` tokens."""
    frame = read_sidecar(params.sidecar).info.frame if params.sidecar else params.frame
    layout = CacheLayout(
        padded_ctx(n_ctx),
        params.n_sink,
        params.n_window,
        n_ubatch,
        frame,
        n_text_sink=params.n_text_sink,
        n_seq_max=n_seq,
        kv_unified=True,
    )
    return {"n_keep": layout.n_cell, "n_cell": layout.n_cell + layout.n_transit, "n_slot": layout.n_slot}


@contextlib.contextmanager
def open_context(
    model: Any,
    *,
    n_ctx: int = 512,
    n_ubatch: int = 64,
    n_seq_max: int = 1,
    n_threads: int = 1,
    unified: bool = False,
    exact: bool = True,
    window: int | None = None,
    flash_attn: bool = True,
    swa_full: bool = True,
    n_rs_seq: int = 0,
    xkv: native.ScopeParams | None = None,
    on_node: Callable[[], None] | None = None,
) -> Iterator[Context]:
    """A context with a plain or an xkv cache.

    `exact` keeps the plain part in f32, `window` in that type; `on_node` is called for every node of a graph that runs.
    """
    params = lib.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = n_ctx
    params.n_ubatch = n_ubatch
    params.n_seq_max = n_seq_max
    params.n_threads = params.n_threads_batch = n_threads
    params.kv_unified = unified
    params.swa_full = swa_full
    params.n_rs_seq = n_rs_seq
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = window if window is not None else GGML_F32 if exact else GGML_F16
    if on_node:
        callback = lib.ggml_backend_sched_eval_callback(lambda *_: bool(on_node()))  # lives as long as the context
        params.cb_eval = callback
    if xkv:
        n_seq = n_seq_max if unified else 1
        xkv = replace(xkv, **places(xkv, n_ctx * n_seq // n_seq_max, n_ubatch, n_seq))
    with native.scope(xkv) if xkv else contextlib.nullcontext():
        ptr = lib.llama_init_from_model(model, params)
    assert ptr, native.last_error()
    assert native.is_xkv(ptr) == (xkv is not None)
    try:
        yield Context(ptr, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
    finally:
        lib.llama_free(ptr)
