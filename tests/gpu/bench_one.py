"""One cache of `bench` in a process of its own, so that what the card has left is what this cache took. Prints JSON.

Argument: the request as JSON, see `bench.request`. A line is printed after each part that is done, so that what was
measured before a limit of time is not lost.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from xkv_gguf import Llama
from xkv_gguf.runtime.api import llama_cpp
from xkv_gguf.runtime.devices import devices

N_PREFILL = 512
N_DECODE = 32


def card_used() -> int | None:
    """Bytes of the first GPU that are taken, by the driver; None without one."""
    for device in devices():
        if device.kind in ("gpu", "igpu"):
            return device.total - device.free
    return None


def timed(llm: Llama, tokens: Sequence[int]) -> float:
    """Seconds that tokens take after those that are there."""
    begin = time.perf_counter()
    llm.eval(tokens)
    llama_cpp.llama_synchronize(llm.ctx)
    return time.perf_counter() - begin


def measure(request: dict[str, Any]) -> None:
    """Open, fill, decode, prefill; what is known is printed each time."""
    before = card_used()
    depth = request["depth"]
    n_ctx = depth + N_PREFILL + 2 * N_DECODE + 16
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llm = Llama(
            request["model"],
            kv_mode=request["kv_mode"],
            xkv=request["xkv"],
            n_ctx=n_ctx,
            n_batch=N_PREFILL,
            n_threads=request["threads"],
            n_threads_batch=request["threads"],
            n_gpu_layers=request["n_gpu_layers"],
            verbose=False,
        )
    tokens = np.random.default_rng(1).integers(3, llm.n_vocab(), n_ctx).tolist()
    row: dict[str, Any] = {"open_seconds": time.perf_counter() - begin, "n_ctx": llm.n_ctx()}

    def tell() -> None:
        used = card_used()
        row["card_bytes"] = None if used is None or before is None else used - before
        row["report"] = llm.kv_report().to_dict()
        print(json.dumps(row), flush=True)

    # the first evaluations allocate, and make the device's graphs
    warm = timed(llm, tokens[: min(N_PREFILL, depth)])
    rest = tokens[min(N_PREFILL, depth) : depth]
    row["prompt_tps"] = len(rest) / timed(llm, rest) if rest else min(N_PREFILL, depth) / warm
    for token in tokens[depth : depth + 4]:
        timed(llm, [token])
    steps = [timed(llm, [token]) for token in tokens[depth + 4 : depth + 4 + N_DECODE]]
    row["decode_tps"] = 1 / float(np.median(steps))
    row["decode_tps_mean"] = N_DECODE / sum(steps)
    tell()
    start = depth + 4 + N_DECODE
    row["prefill_tps"] = N_PREFILL / timed(llm, tokens[start : start + N_PREFILL])
    tell()
    llm.close()


if __name__ == "__main__":
    measure(json.loads(sys.argv[1]))
