"""``xkv-gguf bench``: speed and memory of caches, measured in turns."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .. import __version__, errors
from ..base.files import check_writable, write_atomic
from ..errors import OptionError, XkvError
from ..lab.bench_plan import N_DECODE, N_PREFILL, Timing, parse_depths, schedule, summarize, table
from ..lab.cache_spec import GRAMMAR, CacheSpec, parse_caches
from ..model.demo_model import demo_model
from ..model.file import open_model
from ..options import XkvOptions
from ..plan.knob import KNOBS
from ..plan.sizes import padded_ctx
from ..runtime.threads import default_threads
from ._knob import add_knob_arguments
from ._model import xkv_values
from ._sidecar import shared_sidecar, with_sidecar

DEFAULT_CACHES = "f16,q8_0,q4_0,xkv"
DEFAULT_DEPTHS = "0,2048,4096,7168"
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="GGUF file (default: the demo model)")
    parser.add_argument(
        "--caches",
        default=DEFAULT_CACHES,
        metavar="LIST",
        help=f"{GRAMMAR}, with commas between (default: %(default)s)",
    )
    parser.add_argument(
        "--depths",
        default=DEFAULT_DEPTHS,
        metavar="LIST",
        help="tokens in the context before each measurement (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="OUT", help="write the figures to this file")
    parser.add_argument("--reps", type=int, default=3, metavar="N", help="repetitions (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads (default: all that may be used, half of them to decode)"
    )
    parser.add_argument("--n-ctx", type=int, default=8192, metavar="N", help="context in tokens (default: %(default)s)")
    parser.add_argument(
        "--sidecar",
        metavar="FILE",
        help="sidecar for xkv caches that name none (default: found beside the model, or made)",
    )
    parser.add_argument(
        "--no-calibration", action="store_true", help="use no sidecar: learn bases from the first tokens"
    )
    parser.add_argument("--no-online", action="store_true", help="keep bases as calibrated, whatever the text is")
    add_knob_arguments(parser, "for xkv without a size of its own; none takes what the sidecar was made for")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the JSON file."""
    common = xkv_values(args)
    XkvOptions.of(common)
    specs = [with_common(spec, common) for spec in parse_caches(args.caches)]
    if args.n_ctx < N_PREFILL:
        raise OptionError(f"--n-ctx: {args.n_ctx}, expected {N_PREFILL} or more")
    n_ctx = padded_ctx(args.n_ctx)
    depths = parse_depths(args.depths, n_ctx)
    if args.reps < 1:
        raise OptionError(f"--reps: {args.reps}, expected 1 or more")
    if args.threads is not None and args.threads < 1:
        raise OptionError(f"--threads: {args.threads}, expected 1 or more")
    out = Path(args.json) if args.json is not None else None
    if out is not None:
        check_writable(out)
    model = open_model(args.model if args.model is not None else demo_model()).path
    # made here when there is none, so that no worker's memory counts it
    sidecar = shared_sidecar(model, specs, args)
    specs = [with_sidecar(spec, sidecar) for spec in specs]
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": {
            "model": model.name,
            "n_ctx": n_ctx,
            "threads": args.threads,
            "reps": args.reps,
            "n_prefill": N_PREFILL,
            "n_decode": N_DECODE,
        },
        "rows": measure(model, specs, depths, args.reps, {"n_ctx": n_ctx, "threads": args.threads}),
    }
    if out is not None:
        write_atomic(out, json.dumps(result, indent=1) + "\n")
    print(table(result["rows"]))
    return 0


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


def with_common(spec: CacheSpec, common: Mapping[str, Any]) -> CacheSpec:
    """A cache with the options of the command line, where it has no size, calibration or value of its own.

    The sidecar is left out, see `shared_sidecar`.

    Raises
    ------
    OptionError
        They do not go together.
    """
    if spec.kv_mode != "xkv":
        return spec
    left_out = {"sidecar"}
    if any(name in spec.options for name in (*KNOBS, "rank")):
        left_out |= set(KNOBS)
    if "sidecar" in spec.options:
        left_out.add("calibrate")
    options = {**{name: value for name, value in common.items() if name not in left_out}, **spec.options}
    try:
        XkvOptions.of(options)
    except OptionError as error:
        raise OptionError(f"cache {spec.name}: {error}") from error
    return replace(spec, options=options)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, system, versions."""
    from ..runtime import loader

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
