"""The verb `inspect`: what is in a sidecar or a model, and the cache that is planned with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..base.text import format_bytes, format_table
from ..plan.groups import name_layers
from ._args import add_size, size_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("file", metavar="FILE", help="sidecar or GGUF model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="PICTURE", help="draw the spectra into a .png, .svg or .pdf file")
    parser.add_argument(
        "--n-ctx", type=int, metavar="N", help="context in tokens to plan for (default: what the sidecar was made for)"
    )
    add_size(parser, "none of them plans what the sidecar was made for")


def run(args: argparse.Namespace) -> int:
    """Run the verb.

    Raises
    ------
    XkvError
        The file cannot be read, the size is out of reach, or the picture cannot be drawn.
    """
    from ..describe import beside, describe, is_sidecar, plan_of
    from ..errors import OptionError
    from ..plan.size_target import one_target
    from ..plan.sizes import known_shape
    from ..sidecar.read import read_sidecar

    path = Path(args.file)
    if args.n_ctx is not None and not 1 <= args.n_ctx < 1 << 31:
        raise OptionError(f"--n-ctx: {args.n_ctx}, expected 1 or more")
    if args.plot is not None and not is_sidecar(path):
        raise OptionError(f"--plot draws the spectra of a sidecar, {path} is none")
    target = one_target(size_values(args))
    found = describe(path, target, args.n_ctx)
    if args.plot is not None:
        from ..sidecar.plot import plot_spectra

        sidecar = read_sidecar(path)
        info = sidecar.info
        shape = known_shape(beside(path), info.embd_k, info.embd_v)
        plot_spectra(sidecar, plan_of(sidecar, shape, target or info.target, args.n_ctx or info.n_ctx), Path(args.plot))
    print(json.dumps(found, indent=2) if args.json else "\n".join(lines(found)))
    return 0


def lines(found: dict[str, Any]) -> Iterable[str]:
    """A description as text."""
    model = found["model"]
    if found["kind"] == "sidecar":
        calibration, made_for = found["calibration"], found["made_for"]
        source = {"self": "text of its own", "package": "the package's texts"}.get(calibration["source"], "files")
        yield f"sidecar     {found['path']} ({format_bytes(found['bytes'])}, format version {found['format_version']})"
        yield f"model       {model['architecture']} {model['name']!r}, fingerprint {model['fingerprint'][:16]}"
        yield (
            f"calibrated  on {calibration['tokens']} tokens of {source}, sequences of {calibration['n_ctx']}, "
            f"seed {calibration['seed']}; chunks of {found['frame']}"
        )
        yield f"made for    {made_for['knob']} {made_for['value']} at n_ctx {made_for['n_ctx']}"
    else:
        yield f"model       {found['path']} ({format_bytes(found['bytes'])})"
        yield f"            {model['architecture']} {model['name']!r}, {found['layers']} layers"
        yield f"sidecar     {found['sidecar'] or 'none yet; make one with `xkv-gguf convert`'}"
        if found["sidecar_problem"]:
            yield f"            {found['sidecar_problem']}"
    if found["plan"] is not None:
        yield from plan_lines(found["plan"])
    yield ""
    caches = found["caches"]
    contexts = list(caches["f16"]["totals"])
    rows = [["cache", "bytes/token", *map(tokens, contexts)]]
    for name, cache in caches.items():
        row = [name, f"{cache['bytes_per_token']:.0f}"]
        for n in contexts:
            total = cache["totals"][n]
            ratio = f"{caches['f16']['totals'][n] / total:.2f}x" if total else ""
            row.append(f"{format_bytes(total)} ({ratio})" if total else "out of reach")
        rows.append(row)
    yield from format_table(rows, "<>" + ">" * len(contexts))


OF_K = ["those of K", "", ""]
"""What stands for V that is a part of K."""


def plan_lines(plan: dict[str, Any]) -> Iterable[str]:
    """A plan as text."""
    yield (
        f"plan        {plan['knob']} {plan['value']} at n_ctx {plan['n_ctx']}: {format_bytes(plan['total_bytes'])}, "
        f"{plan['ratio']:.2f}x smaller than f16 (coefficients alone {plan['coef_ratio']:.2f}x)"
    )
    yield (
        f"            sinks {plan['n_sink']} + {plan['n_text_sink']}, window {plan['n_window']} {plan['type_window']}, "
        f"n_ubatch {plan['n_ubatch']}, bases {' '.join(plan['types_basis'])}"
    )
    divergence = "" if plan["kld"] is None else f", divergence {plan['kld']:.4f} nats"
    yield f"predicted   distortion {plan['distortion']:.4f}{divergence}"
    if plan["stages"]:
        early = ", ".join(f"{stage['distortion']:.4f} up to {stage['n_slot']} tokens" for stage in plan["stages"])
        yield f"            {early}"
    yield "            " + ", ".join(f"{name} {format_bytes(size)}" for name, size in plan["parts"].items())
    if plan["work"] is not None:
        yield from work_lines(plan["work"])
    yield ""
    rows = [["layers", "K directions", "of", "kept", "V directions", "of", "kept"]]
    for group in plan["groups"]:
        row = [name_layers(group["layers"])]
        for kind in ("k", "v"):
            kept = group[f"kept_{kind}"]
            row += (
                [segment_text(group[f"segments_{kind}"]), str(group[f"dim_{kind}"]), f"{kept:.2%}"]
                if kept is not None
                else OF_K
            )
        rows.append(row)
    yield from format_table(rows, "<>>>>>>")


def work_lines(work: dict[str, float]) -> Iterable[str]:
    """Work of attention as text."""
    f16 = work["bytes_read_f16"]
    yield (
        f"work        decode {work['decode']:.1f}x the multiply-adds of f16's attention (dense {work['dense']:.1f}x), "
        f"prefill {work['prefill']:.2f}x; reads {work['bytes_read'] / f16:.2f}x its bytes "
        f"(dense {work['bytes_read_dense'] / f16:.2f}x)"
    )
    yield (
        f"            per stored token; decoding takes the lead of all tokens and the rest where it matters, dense "
        f"all: {work['bytes_read']:.0f} bytes per layer, f16 {f16:.0f}"
    )


def segment_text(segments: Sequence[Sequence[Any]]) -> str:
    """Segments as "64xq8_0 96xq4_0"."""
    return " ".join(f"{rank}x{kind}" for rank, kind in segments)


def tokens(n: str) -> str:
    """A number of tokens for people, in thousands of 1024 where they are whole."""
    return n if int(n) % 1024 else f"{int(n) // 1024}k"
