"""A process that holds one cache for `bench`, measures when told, and answers on a pipe.

One cache per process: its peak memory is the process's. The protocol is one JSON object per line, requests on
standard input and answers on the descriptor that standard output had at the start.

======================================================  ==============================================
request                                                 answer
======================================================  ==============================================
``{"op": "open", "model", "kv_mode", "xkv", "n_ctx",    ``{"report": KvReport.to_dict()}``
"threads"}``
``{"op": "measure", "depth"}``                          ``{"prefill_tps", "decode_tps"}``
``{"op": "peak"}``                                      ``{"peak_rss_bytes"}``
======================================================  ==============================================

An error that a user can repair is answered with ``{"error": text, "kind": class name}``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import XkvError
from .bench_plan import N_DECODE, N_PREFILL

if TYPE_CHECKING:
    from ..llama import Llama

SEED = 1


class Bench:
    """One model on one cache, and the tokens that fill it."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        from .. import Llama
        from ..runtime.api import llama_cpp

        self._api = llama_cpp
        threads = (
            {} if request["threads"] is None else dict.fromkeys(("n_threads", "n_threads_batch"), request["threads"])
        )
        self.llm: Llama = Llama(
            request["model"],
            kv_mode=request["kv_mode"],
            xkv=request["xkv"],
            n_ctx=request["n_ctx"],
            n_batch=N_PREFILL,
            verbose=False,
            **threads,
        )
        self._tokens = filler_tokens(self.llm, request["n_ctx"])
        # the first evaluation allocates and touches what later ones reuse
        self._fill(N_PREFILL)
        self._decode(4)
        self._cut(0)

    def measure(self, depth: int) -> dict[str, float]:
        """Time N_DECODE tokens one by one and one batch of N_PREFILL, each after `depth` tokens."""
        if self.llm.n_tokens > depth:
            self._cut(0)
        self._fill(depth)
        decode = self._decode(N_DECODE)
        self._cut(depth)
        prefill = self._timed(self._tokens[depth : depth + N_PREFILL])
        return {"prefill_tps": N_PREFILL / prefill, "decode_tps": N_DECODE / decode}

    def _fill(self, depth: int) -> None:
        self.llm.eval(self._tokens[self.llm.n_tokens : depth])

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
    """Tokens of ordinary text, as many as asked for; the same in every process."""
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
    bench: Bench | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["op"] == "open":
                bench = Bench(request)
                answer = {"report": bench.llm.kv_report().to_dict()}
            elif request["op"] == "measure":
                assert bench is not None
                answer = dict(bench.measure(request["depth"]))
            else:
                answer = {"peak_rss_bytes": peak_rss_bytes()}
        except XkvError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)
