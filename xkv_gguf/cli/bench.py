"""``xkv-gguf bench``: speed and memory of caches, measured in turns."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base.files import check_writable, write_atomic
from ..errors import OptionError
from ..lab.bench import machine, measure
from ..lab.bench_plan import N_DECODE, N_PREFILL, parse_depths, table
from ..lab.cache_spec import CacheSpec, parse_caches
from ..model.file import open_model
from ..options import XkvOptions
from ..plan.size_target import TARGETS
from ..plan.sizes import padded_ctx
from ._args import (
    add_adaptation,
    add_caches,
    add_model,
    add_sidecar,
    add_size,
    add_threads,
    check_counts,
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
    parser.add_argument("--json", metavar="OUT", help="write the figures to this file")
    parser.add_argument("--reps", type=int, default=3, metavar="N", help="repetitions (default: %(default)s)")
    add_threads(parser)
    parser.add_argument("--n-ctx", type=int, default=8192, metavar="N", help="context in tokens (default: %(default)s)")
    add_sidecar(parser, "xkv caches that name none")
    add_adaptation(parser, "text")
    add_size(parser, "for xkv without a size of its own; none takes what the sidecar was made for")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the JSON file."""
    common = xkv_values(args)
    XkvOptions.of(common)
    specs = [with_common(spec, common) for spec in parse_caches(args.caches)]
    if args.n_ctx < N_PREFILL:
        raise OptionError(f"--n-ctx: {args.n_ctx}, expected {N_PREFILL} or more")
    n_ctx = padded_ctx(args.n_ctx)
    depths = parse_depths(args.depths, n_ctx)
    check_counts(args, "reps", "threads")
    out = Path(args.json) if args.json is not None else None
    if out is not None:
        check_writable(out)
    model = open_model(model_path(args)).path
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
    if any(name in spec.options for name in (*TARGETS, "rank")):
        left_out |= set(TARGETS)
    if "sidecar" in spec.options:
        left_out.add("calibrate")
    options = {**{name: value for name, value in common.items() if name not in left_out}, **spec.options}
    try:
        XkvOptions.of(options)
    except OptionError as error:
        raise OptionError(f"cache {spec.name}: {error}") from error
    return replace(spec, options=options)
