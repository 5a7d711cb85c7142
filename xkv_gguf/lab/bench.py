"""Measures caches in turns, each in a process of its own; and the machine that they are measured on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .. import __version__, errors
from ..base.partial import Partial, file_identity
from ..errors import XkvError
from ..runtime import loader
from ..runtime.threads import default_threads
from .bench_plan import Timing, n_tokens, schedule, summarize
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

    def ask(self, on_done: Callable[[int], object] | None = None, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Parameters
        ----------
        on_done : callable, optional
            Gets the tokens that are done, now and then.
        **request
            See `bench_worker`.

        Raises
        ------
        XkvError
            Of the class that the worker raised, or when the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                kind: type[XkvError] = getattr(errors, answer["kind"], XkvError)
                raise kind(f"cache {self.spec.name}: {answer['error']}")
            if "done" not in answer:
                return answer
            if on_done is not None:
                on_done(answer["done"])
        raise XkvError(f"cache {self.spec.name}: its process ended with status {self.process.wait()}")


@dataclass(frozen=True)
class Plan:
    """What one run is to find out.

    Attributes
    ----------
    model : Path
    specs : sequence of CacheSpec
    depths : sequence of int
        Tokens, ascending.
    reps : int
    settings : mapping
        Of every cache: n_ctx, threads, threads_decode; n_gpu_layers and rpc_servers where layers are on devices.
    """

    model: Path
    specs: Sequence[CacheSpec]
    depths: Sequence[int]
    reps: int
    settings: Mapping[str, Any]

    @property
    def order(self) -> list[tuple[str, int, int]]:
        """See `bench_plan.schedule`."""
        return schedule([spec.name for spec in self.specs], self.depths, self.reps)

    def key(self, name: str, depth: int, rep: int) -> dict[str, Any]:
        """What a measurement depends on, besides model, machine and `settings`."""
        spec = next(spec for spec in self.specs if spec.name == name)
        sidecar = spec.options.get("sidecar")
        identity = file_identity(Path(sidecar)) if sidecar is not None else None
        return {"cache": name, **spec.arguments, "sidecar": identity, "depth": depth, "rep": rep}


def measure(plan: Plan, partial: Partial) -> list[dict[str, Any]]:
    """Run all measurements in turns, on RPC servers one cache after the other; what `partial` has is taken from there.

    Parameters
    ----------
    plan : Plan
    partial : Partial
        Takes each measurement as soon as it is there.

    Returns
    -------
    list of dict
        See `bench_plan.summarize`.

    Raises
    ------
    XkvError
        A cache cannot be had, or its process ended.
    """
    keys = {turn: plan.key(*turn) for turn in plan.order}
    found = {turn: timing for turn, key in keys.items() if (timing := partial.get(**key)) is not None}
    missing = [turn for turn in plan.order if turn not in found]
    if found:
        print(f"{len(found)} of {len(keys)} measurements are taken from {partial.path}", file=sys.stderr)
    specs = [spec for spec in plan.specs if spec.name in {name for name, _, _ in missing}]
    # a server serves one process at a time: caches on it cannot take turns
    at_once = [[spec] for spec in specs] if "rpc_servers" in plan.settings else [specs]
    with tqdm(total=sum(n_tokens(depth) for _, depth, _ in missing), unit="tok", disable=None) as bar:
        for together in at_once:
            with contextlib.ExitStack() as stack:
                workers = {spec.name: stack.enter_context(Worker(spec)) for spec in together}
                for name, worker in workers.items():
                    bar.set_description(f"opening {name}")
                    worker.ask(op="open", model=str(plan.model), **worker.spec.arguments, **plan.settings)
                for name, depth, rep in missing:
                    if name not in workers:
                        continue
                    bar.set_description(f"{name} at {depth}, run {rep + 1} of {plan.reps}")
                    found[name, depth, rep] = timing = _one(workers[name], depth, bar)
                    partial.put(timing, **keys[name, depth, rep])
    timings = [Timing(name, depth, **found[name, depth, rep]) for name, depth, rep in plan.order]
    return summarize(timings, [spec.name for spec in plan.specs])


def _one(worker: Worker, depth: int, bar: Any) -> dict[str, Any]:
    start = bar.n
    answer = worker.ask(lambda done: bar.update(start + done - bar.n), op="measure", depth=depth)
    bar.update(start + n_tokens(depth) - bar.n)
    return answer


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
