"""The options that decide an xkv cache's size, which `convert`, `inspect`, `run`, `chat` and `bench` share."""

from __future__ import annotations

import argparse
from typing import Any

from ..plan.knob import KNOBS, QUALITIES


def add_knob_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --ratio, --coef-ratio, --budget and --quality, of which one can be given; `default` says what none means."""
    group = parser.add_argument_group("cache size", f"One of these; {default}.").add_mutually_exclusive_group()
    group.add_argument("--ratio", type=float, metavar="R", help="f16's bytes over all bytes of the cache at n_ctx")
    group.add_argument(
        "--coef-ratio", type=float, metavar="R", help="f16's bytes per token over those of the coefficients alone"
    )
    group.add_argument("--budget", type=_size, metavar="BYTES", help="all bytes of the cache, such as 26MiB or 1.5GiB")
    names = ", ".join(f"{name} (coef-ratio {ratio:g})" for name, ratio in QUALITIES.items())
    group.add_argument("--quality", metavar="NAME", help=names)


def knob_values(args: argparse.Namespace) -> dict[str, Any]:
    """The knob that was given, by the name of its option in `XkvOptions`; empty when there is none."""
    return {kind: value for kind in KNOBS if (value := getattr(args, kind)) is not None}


def _size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
