"""A process that holds one cache for `bench`, measures when told, and answers on a pipe.

One cache per process: its peak memory is the process's. The protocol is one JSON object per line, requests on
standard input and answers on the descriptor that standard output had at the start.

======================================================  ==============================================
request                                                 answer
======================================================  ==============================================
``{"op": "open", "model", "kv_mode", "xkv", "n_ctx",    ``{}``
"threads", "threads_decode"}``, and, where layers are
on devices, "n_gpu_layers" and "rpc_servers"
``{"op": "measure", "depth"}``                          ``{"prefill_tps", "decode_tps", "prompt_tps",
                                                        "report": KvReport.to_dict(),
                                                        "peak_rss_bytes"}``, after any number of
                                                        ``{"done": tokens}``
======================================================  ==============================================

An error that a user can repair is answered with ``{"error": text, "kind": class name}``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import XkvError
from .bench_plan import N_DECODE, N_PREFILL

if TYPE_CHECKING:
    from ..llama import Llama

SEED = 1
NO_TOKENIZER = ("none", "no_vocab")


class Bench:
    """One model on one cache, and the tokens that fill it."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        from .. import Llama
        from ..runtime.api import llama_cpp

        self._api = llama_cpp
        self.llm: Llama = Llama(
            request["model"],
            kv_mode=request["kv_mode"],
            xkv=request["xkv"],
            n_ctx=request["n_ctx"],
            n_batch=N_PREFILL,
            n_threads=request["threads_decode"],
            n_threads_batch=request["threads"],
            verbose=False,
            **{name: request[name] for name in ("n_gpu_layers", "rpc_servers") if name in request},
        )
        self._tokens = filler_tokens(self.llm, request["n_ctx"])
        # the first evaluation allocates and touches what later ones reuse
        self._timed(self._tokens[:N_PREFILL])
        self._decode(4)

    def measure(self, depth: int, on_done: Callable[[int], object]) -> dict[str, Any]:
        """Time `depth` tokens from an empty cache, then N_DECODE one by one and N_PREFILL at once, each after these.

        From empty each time: a cache that has held more tokens may have coded those that are left another way.
        """
        self._cut(0)
        self.llm.on_eval = lambda done, _: on_done(done)
        prompt = self._timed(self._tokens[:depth])
        self.llm.on_eval = None
        decode = self._decode(N_DECODE)
        self._cut(depth)
        prefill = self._timed(self._tokens[depth : depth + N_PREFILL])
        return {
            "prefill_tps": N_PREFILL / prefill,
            "decode_tps": N_DECODE / decode,
            "prompt_tps": depth / prompt if depth else None,
            "report": self.llm.kv_report().to_dict(),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _decode(self, count: int) -> float:
        start = self.llm.n_tokens
        return sum(self._timed([token]) for token in self._tokens[start : start + count])

    def _timed(self, tokens: list[int]) -> float:
        begin = time.perf_counter()
        self.llm.eval(tokens)
        self._api.llama_synchronize(self.llm.ctx)
        return time.perf_counter() - begin

    def _cut(self, depth: int) -> None:
        self.llm.n_tokens = depth
        self.llm.eval([])


def filler_tokens(llm: Llama, count: int) -> list[int]:
    """Tokens of ordinary text, as many as asked for; the same in every process.

    A model without a tokenizer gets random ones.
    """
    if llm.metadata.get("tokenizer.ggml.model") in NO_TOKENIZER:
        rng = random.Random(SEED)
        return [rng.randrange(llm.n_vocab()) for _ in range(count)]
    from .haystack import paragraphs

    tokens: list[int] = []
    for paragraph in paragraphs(SEED):
        tokens += llm.tokenize((paragraph + "\n\n").encode(), add_bos=False)
        if len(tokens) >= count:
            break
    return tokens[:count]


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints does not disturb the protocol
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends this process

    def send(answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    bench: Bench | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "open":
                bench = Bench(request)
                send({})
            else:
                assert bench is not None
                send(bench.measure(request["depth"], lambda done: send({"done": done})))
        except XkvError as error:
            send({"error": str(error), "kind": type(error).__name__})
