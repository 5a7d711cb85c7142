"""``xkv-gguf fit``: which caches and contexts fit into a memory, before anything is allocated."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..base.text import format_bytes, format_table
from ..errors import OptionError
from ..lab.cache_spec import CacheSpec, parse_caches
from ..model.file import ModelFile, open_model
from ..options import XkvOptions
from ..plan.size_target import parse_bytes
from ..sidecar.find import find_sidecar
from ..sidecar.read import read_sidecar
from ._args import add_caches, add_devices, add_model, add_n_ubatch, add_sidecar, check_counts, model_path, size

if TYPE_CHECKING:
    from ..fitting import Fit, Kind

DEFAULT_CACHES = "f16,q8_0,q4_0,xkv:4,xkv:7,xkv:10"
NO_LIMIT = 1 << 20
"""Tokens that are enough where the model does not say how many it was trained with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_model(parser)
    parser.add_argument(
        "--memory",
        type=size,
        required=True,
        metavar="BYTES",
        help="for weights, cache and compute buffers together, such as 8GiB",
    )
    parser.add_argument(
        "--n-ctx",
        type=int,
        metavar="N",
        help="tell what fits at this context (default: find the longest of each cache)",
    )
    add_caches(parser, DEFAULT_CACHES)
    add_sidecar(parser, "xkv caches that name none; sizes hardly depend on it, and none is made")
    add_n_ubatch(parser)
    add_devices(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what fits; 0 also where nothing does."""
    memory = parse_bytes(args.memory, "--memory")
    check_counts(args, "n_ctx", "n_ubatch")
    specs = parse_caches(args.caches)
    model = open_model(model_path(args))
    kinds = [_kind(spec, model, args.sidecar) for spec in specs]

    from ..fitting import Fitting, find_longest, size_at
    from ..runtime import rpc

    settings = {"n_gpu_layers": args.n_gpu_layers, "n_ubatch": args.n_ubatch}
    settings = {name: value for name, value in settings.items() if value is not None}
    rpc_fused = False
    if args.rpc is not None:
        settings.setdefault("n_gpu_layers", -1)
        rpc_fused = rpc.connect(rpc.parse_servers(args.rpc))
    most = model.n_ctx_train or NO_LIMIT
    with Fitting(model, settings, rpc_fused) as fitting:
        fits = [
            find_longest(fitting, kind, memory, most)
            if args.n_ctx is None
            else size_at(fitting, kind, memory, args.n_ctx)
            for kind in kinds
        ]
    rows = list(zip((spec.name for spec in specs), fits, strict=True))
    if args.json:
        print(json.dumps(_to_dict(model, memory, args.n_ctx, rows)))
    else:
        print("\n".join(_lines(model, memory, args.n_ctx, rows)))
    return 0


def _kind(spec: CacheSpec, model: ModelFile, sidecar: str | None) -> Kind:
    from ..fitting import Kind

    if spec.kv_mode != "xkv":
        return Kind(spec.kv_mode)
    options = XkvOptions.of(dict(spec.options))
    if options.memory is not None:
        raise OptionError(f"--caches: {spec.name!r} states a memory, expected a size of its own; --memory is for all")
    if not options.calibrate:
        return Kind("xkv", options)
    path = options.sidecar or sidecar or find_sidecar(model.path)
    if path is None:
        return Kind("xkv", options)
    found = read_sidecar(path)
    found.check_model(model.path)
    return Kind("xkv", options, found)


def _lines(model: ModelFile, memory: int, n_ctx: int | None, rows: list[tuple[str, Fit]]) -> list[str]:
    own = f"the model's own context is {model.n_ctx_train}" if model.n_ctx_train else "the model states no context"
    what = "longest context" if n_ctx is None else f"n_ctx {rows[0][1].n_ctx}"
    table = [["cache", what, "weights", "cache bytes", "compute", "renewals", "total"]]
    notes = []
    for name, fit in rows:
        if fit.context is None:
            table.append([name, "none" if n_ctx is None else "no", *("-" for _ in range(5))])
            notes.append(f"{name}: {fit.why}")
            continue
        taken = fit.context.taken
        sizes = (taken.weights, taken.cache, taken.compute, taken.renewals, taken.total)
        answer = str(fit.n_ctx) if n_ctx is None else "fits" if fit.fits else "no"
        table.append([name, answer, *map(format_bytes, sizes)])
    return [
        f"{model.path.name} in {format_bytes(memory)}; {own}",
        *format_table(table, "<>>>>>>"),
        *notes,
    ]


def _to_dict(model: ModelFile, memory: int, n_ctx: int | None, rows: list[tuple[str, Fit]]) -> dict[str, Any]:
    return {
        "model": model.path.name,
        "memory": memory,
        "n_ctx_train": model.n_ctx_train,
        "n_ctx": n_ctx,
        "caches": [_row(name, fit) for name, fit in rows],
    }


def _row(name: str, fit: Fit) -> dict[str, Any]:
    row: dict[str, Any] = {"cache": name, "n_ctx": fit.n_ctx or None, "fits": fit.fits}
    if fit.context is None:
        return {**row, "why": fit.why}
    context = fit.context
    return {
        **row,
        "bytes": {**asdict(context.taken), "total": context.taken.total},
        "parts": dict(context.sizes.parts),
        "scratch": dict(context.sizes.scratch),
        "devices": {
            d.name: {"weights": d.weights, "cache": d.cache, "compute": d.compute} for d in context.sizes.devices
        },
    }
