"""Measures caches in turns, each in a process of its own; and the machine that they are measured on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .. import __version__, errors
from ..errors import XkvError
from ..runtime import loader
from ..runtime.threads import default_threads
from .bench_plan import Timing, schedule, summarize
from .cache_spec import CacheSpec

# with this process's search path: -m would put the current folder in front
START_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from xkv_gguf.lab.bench_worker import main; main()"
)


class Worker:
    """A process with one cache, see `bench_worker`."""

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        command = [sys.executable, "-c", START_WORKER, json.dumps(sys.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        if kind is not None:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises
        ------
        XkvError
            Of the class that the worker raised, or when the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            raise XkvError(f"cache {self.spec.name}: its process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind: type[XkvError] = getattr(errors, answer["kind"], XkvError)
            raise kind(f"cache {self.spec.name}: {answer['error']}")
        return answer


def measure(
    model: Path, specs: list[CacheSpec], depths: list[int], reps: int, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Run all measurements in turns.

    Parameters
    ----------
    model : Path
    specs : list of CacheSpec
    depths : list of int
        Tokens, ascending.
    reps : int
    settings : mapping
        n_ctx and threads.

    Returns
    -------
    list of dict
        See `bench_plan.summarize`.
    """
    plan = schedule([spec.name for spec in specs], depths, reps)
    timings = []
    with contextlib.ExitStack() as stack:
        workers = {spec.name: stack.enter_context(Worker(spec)) for spec in specs}
        reports = {}
        for name, worker in workers.items():
            answer = worker.ask(op="open", model=str(model), **worker.spec.arguments, **settings)
            reports[name] = answer["report"]
        for name, depth in tqdm(plan, desc="measuring", unit="run", disable=None):
            answer = workers[name].ask(op="measure", depth=depth)
            timings.append(Timing(name, depth, answer["prefill_tps"], answer["decode_tps"]))
        peaks = {name: worker.ask(op="peak")["peak_rss_bytes"] for name, worker in workers.items()}
    return summarize(timings, reports, peaks)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, system, versions."""
    return {
        "processor": _processor(),
        "cores": default_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "xkv_gguf": __version__,
        "build_id": loader.load().build_id,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
