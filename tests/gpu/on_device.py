"""What `check` runs on a device in a process of its own: a random model's logits and text with several caches.

Arguments: the device (gpu or cpu), the model, the .npz file to write, and sizes as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shape import SHAPES
from tests.native import harness
from tests.native.sidecars import Bases, write_random
from xkv_gguf import Llama
from xkv_gguf.runtime import devices, native

SHAPE = "smollm2-135m"
FUSED = native.FUSED_CPU + native.FUSED_OTHER
GROUP_SIZE = 5
FRAME = 64
N_GREEDY = 100
N_PROMPT = 200
N_CTX = 2048
"""Of the contexts at a ratio, most of whose tokens are compressed."""
RATIO = 7
N_FORCED = 64

Logits = dict[str, Any]


def full_rank(model: Any, bases: Bases, tokens: Sequence[int], threads: int) -> tuple[Logits, dict[str, Any]]:
    """Logits of a plain cache, of plain flash attention, and of xkv caches with all directions; and what ran where."""
    found: Logits = {}
    where: dict[str, Any] = {}
    fused = replace(bases.params(), fused=FUSED)
    stock = replace(bases.params(), fused=0)
    caches: dict[str, dict[str, Any]] = {
        "plain": {"flash_attn": False},
        "flash": {"exact": False},
        "op": {"xkv": fused},
        "stock": {"xkv": stock},
    }
    for name, settings in caches.items():
        with harness.open_context(model, n_threads=threads, **settings) as ctx:
            for path, logits in harness.run_paths(ctx, tokens).items():
                found[f"{name} {path}"] = logits
            parts = {part.name: [part.n_layer, part.n_fused, part.cache] for part in devices.context_devices(ctx.ptr)}
            where[name] = {"parts": parts, "splits": devices.context_splits(ctx.ptr)}
    for name in ("plain", "op"):
        with harness.open_context(model, n_threads=threads, **caches[name]) as ctx:
            found[f"{name} greedy"], found[f"{name} greedy logits"] = greedy(ctx, tokens[:N_PROMPT])
    return found, where


def greedy(ctx: harness.Context, prompt: Sequence[int]) -> tuple[Any, Any]:
    """The most probable tokens after a prompt, one by one, and the logits that each was chosen by."""
    logits = [ctx.feed(prompt, 64)[-1]]
    for _ in range(N_GREEDY - 1):
        logits.append(ctx.decode((0, [int(logits[-1].argmax())]))[0])
    return np.array([int(row.argmax()) for row in logits]), np.array(logits)


def at_ratio(path: Path, tokens: Sequence[int], on_card: bool, threads: int) -> Logits:
    """Logits of single tokens after a long prompt: f16, and xkv by the op and by stock ops."""
    found: Logits = {}
    for name, options in {"f16": None, "op": {"fused": True}, "stock": {"fused": False}}.items():
        llm = Llama(
            str(path),
            kv_mode="f16" if options is None else "xkv",
            xkv=None if options is None else {"ratio": RATIO, "online": False, **options},
            n_ctx=N_CTX,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=-1 if on_card else 0,
            verbose=False,
        )
        llm.eval(tokens[:-N_FORCED])
        rows = []
        for token in tokens[-N_FORCED:]:
            llm.eval([token])
            rows.append(np.array(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()], np.float32))
        found[f"{name} at ratio"] = np.array(rows)
        if options is not None:
            found[f"{name} stored"] = np.array(llm.kv_report().n_stored)
        llm.close()
    return found


def main(device: str, model_path: str, out: str, options: str) -> None:
    """Run all and write the arrays, with what ran where as JSON beside them."""
    sizes = json.loads(options)
    n_layer, threads = sizes["n_layer"], sizes["threads"]
    path, on_card = Path(model_path), device != "cpu"
    embd = SHAPES[SHAPE].embd_kv
    bases = write_random(Path(out).with_suffix(".xkv.gguf"), n_layer, (embd, embd), min(GROUP_SIZE, n_layer), FRAME)
    rng = np.random.default_rng(1)
    tokens = [int(t) for t in rng.integers(3, sizes["n_vocab"], N_CTX - 8)]
    model = harness.open_model(path, (n_layer + 1,) if on_card else ())
    found, where = full_rank(model, bases, tokens, threads)
    harness.close_model(model)
    found |= at_ratio(path, tokens[: sizes["n_tokens"]], on_card, threads)
    np.savez(out, **found)
    Path(out).with_suffix(".json").write_text(json.dumps(where), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
