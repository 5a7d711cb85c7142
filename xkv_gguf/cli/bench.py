"""``xkv-gguf bench``: speed and memory of caches, measured in turns."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base.files import check_writable, write_atomic
from ..base.partial import Partial
from ..base.pictures import check_picture
from ..errors import OptionError
from ..lab.bench import Plan, machine, measure
from ..lab.bench_plan import N_DECODE, N_PREFILL, conditions, parse_depths, table
from ..lab.cache_spec import CacheSpec, parse_caches
from ..model.file import open_model
from ..model.fingerprint import model_fingerprint
from ..options import XkvOptions
from ..plan.size_target import TARGETS
from ..plan.sizes import padded_ctx
from ..runtime.threads import default_decode_threads, default_threads
from ._args import (
    add_adaptation,
    add_caches,
    add_devices,
    add_memory_size,
    add_model,
    add_sidecar,
    add_threads,
    check_counts,
    device_settings,
    model_path,
    shared_sidecar,
    with_sidecar,
    xkv_values,
)

DEFAULT_CACHES = "f16,q8_0,q4_0,xkv"
DEFAULT_DEPTHS = "0,2048,4096,7168"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_model(parser)
    add_caches(parser, DEFAULT_CACHES)
    parser.add_argument(
        "--depths",
        default=DEFAULT_DEPTHS,
        metavar="LIST",
        help="tokens in the context before each measurement (default: %(default)s)",
    )
    parser.add_argument(
        "--json", metavar="OUT", help="write the figures to this file; an interrupted run goes on from OUT.partial"
    )
    parser.add_argument("--plot", metavar="PICTURE", help="draw speeds against depth into a .png, .svg or .pdf")
    parser.add_argument("--reps", type=int, default=3, metavar="N", help="repetitions (default: %(default)s)")
    add_threads(parser)
    add_devices(parser)
    parser.add_argument("--n-ctx", type=int, default=8192, metavar="N", help="context in tokens (default: %(default)s)")
    add_sidecar(parser, "xkv caches that name none")
    add_adaptation(parser, "text")
    add_memory_size(parser, "for xkv without a size of its own; none takes what the sidecar was made for")


def run(args: argparse.Namespace) -> int:
    """Measure, write the JSON file and the plot, and print the table."""
    common = xkv_values(args)
    XkvOptions.of(common)
    specs = [with_common(spec, common) for spec in parse_caches(args.caches)]
    if args.n_ctx < N_PREFILL:
        raise OptionError(f"--n-ctx: {args.n_ctx}, expected {N_PREFILL} or more")
    n_ctx = padded_ctx(args.n_ctx)
    depths = parse_depths(args.depths, n_ctx)
    check_counts(args, "reps", "threads")
    out, picture = (Path(name) if name is not None else None for name in (args.json, args.plot))
    if out is not None:
        check_writable(out)
    if picture is not None:
        check_picture(picture)
    model = open_model(model_path(args)).path
    # made here when there is none, so that no worker's memory counts it
    sidecar = shared_sidecar(model, specs, args)
    specs = [with_sidecar(spec, sidecar) for spec in specs]
    every = {
        "n_ctx": n_ctx,
        "threads": args.threads or default_threads(),
        "threads_decode": args.threads or default_decode_threads(),
        **device_settings(args),
    }
    settings = {
        "model": model.name,
        **every,
        "reps": args.reps,
        "n_prefill": N_PREFILL,
        "n_decode": N_DECODE,
    }
    where = machine()
    partial = Partial(out, "bench", {"machine": where, "model": model_fingerprint(model), **every})
    plan = Plan(model, specs, depths, args.reps, every)
    try:
        rows = measure(plan, partial)
    except KeyboardInterrupt:
        n_done = partial.n_taken + partial.n_put
        note = f"; the same command goes on from {partial.path}" if n_done and out is not None else ""
        print(f"\n{n_done} of {len(plan.order)} measurements are done{note}", file=sys.stderr, end="")
        raise
    result: dict[str, Any] = {"machine": where, "settings": settings, "rows": rows}
    if out is not None:
        write_atomic(out, json.dumps(result, indent=1) + "\n")
    partial.remove()
    if picture is not None:
        from ..lab.bench_plot import plot_rows

        plot_rows(rows, picture, f"{model.name}, {conditions(settings)}")
    print(conditions(settings))
    print(table(rows))
    return 0


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
    sizes = {*TARGETS, "memory"}
    if any(name in spec.options for name in (*sizes, "rank")):
        left_out |= sizes
    if "sidecar" in spec.options:
        left_out.add("calibrate")
    options = {**{name: value for name, value in common.items() if name not in left_out}, **spec.options}
    try:
        XkvOptions.of(options)
    except OptionError as error:
        raise OptionError(f"cache {spec.name}: {error}") from error
    return replace(spec, options=options)
