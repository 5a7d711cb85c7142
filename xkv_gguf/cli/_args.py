"""The options that verbs share: each is declared, checked and read here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..lab.cache_spec import GRAMMAR, CacheSpec
from ..model.demo_model import demo_model
from ..plan.size_target import QUALITIES, TARGETS

OPTIONS = {
    "sidecar": "--sidecar",
    "ratio": "--ratio",
    "coef_ratio": "--coef-ratio",
    "budget": "--budget",
    "quality": "--quality",
    "memory": "--memory",
    "calibrate": "--no-calibration",
    "online": "--no-online",
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="GGUF file (default: the demo model)")


def model_path(args: argparse.Namespace) -> str | Path:
    """The model that is named, as it is written, or else the demo model."""
    return args.model if args.model is not None else demo_model()


def add_threads(parser: argparse._ActionsContainer) -> None:
    """Add --threads."""
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads (default: all that may be used, half of them to decode)"
    )


def thread_settings(threads: int | None) -> dict[str, int]:
    """Arguments of `Llama` for --threads."""
    return {} if threads is None else dict.fromkeys(("n_threads", "n_threads_batch"), threads)


def add_devices(parser: argparse._ActionsContainer) -> None:
    """Add --n-gpu-layers and --rpc."""
    parser.add_argument(
        "--n-gpu-layers", type=int, metavar="N", help="layers on devices, -1 for all (default: 0, with --rpc all)"
    )
    parser.add_argument(
        "--rpc", metavar="HOST:PORT,...", help="servers (xkv-gguf rpc-server) whose devices take layers as well"
    )


def device_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Llama` for --n-gpu-layers and --rpc."""
    values = {"n_gpu_layers": args.n_gpu_layers, "rpc_servers": args.rpc}
    return {name: value for name, value in values.items() if value is not None}


def add_n_ubatch(parser: argparse.ArgumentParser) -> None:
    """Add --n-ubatch."""
    parser.add_argument("--n-ubatch", type=int, metavar="N", help="micro-batch (default: 512, xkv: the plan's)")


def add_caches(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --caches."""
    parser.add_argument(
        "--caches", default=default, metavar="LIST", help=f"{GRAMMAR}, with commas between (default: %(default)s)"
    )


def add_sidecar(parser: argparse._ActionsContainer, whose: str) -> None:
    """Add --sidecar for the caches of `whose`."""
    parser.add_argument(
        "--sidecar", metavar="FILE", help=f"sidecar for {whose} (default: found beside the model, or made)"
    )


def add_adaptation(parser: argparse._ActionsContainer, what: str) -> None:
    """Add --no-calibration and --no-online; `what` is what bases follow."""
    parser.add_argument(
        "--no-calibration", action="store_true", help="use no sidecar: learn bases from the first tokens"
    )
    parser.add_argument("--no-online", action="store_true", help=f"keep bases as calibrated, whatever the {what} is")


def add_size(parser: argparse.ArgumentParser, default: str) -> argparse._ActionsContainer:
    """Add --ratio, --coef-ratio, --budget and --quality, of which one can be given; `default` says what none means.

    Returns their group.
    """
    group = parser.add_argument_group("cache size", f"One of these; {default}.").add_mutually_exclusive_group()
    group.add_argument("--ratio", type=float, metavar="R", help="f16's bytes over all bytes of the cache at n_ctx")
    group.add_argument(
        "--coef-ratio", type=float, metavar="R", help="f16's bytes per token over those of the coefficients alone"
    )
    group.add_argument("--budget", type=size, metavar="BYTES", help="all bytes of the cache, such as 26MiB or 1.5GiB")
    names = ", ".join(f"{name} (coef-ratio {ratio:g})" for name, ratio in QUALITIES.items())
    group.add_argument("--quality", metavar="NAME", help=names)
    return group


def add_memory_size(parser: argparse.ArgumentParser, default: str) -> None:
    """Add what `add_size` does, and --memory, for which a context has to be opened."""
    add_size(parser, default).add_argument(
        "--memory",
        type=size,
        metavar="BYTES",
        help="all bytes of model, cache and compute buffers: the cache takes the rest",
    )


def size_values(args: argparse.Namespace) -> dict[str, Any]:
    """The size target that was given, by the name of its option in `XkvOptions`; empty when there is none."""
    return {kind: value for kind in TARGETS if (value := getattr(args, kind)) is not None}


def xkv_values(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say of an xkv cache, by the names of `XkvOptions`."""
    values = {**({} if args.sidecar is None else {"sidecar": args.sidecar}), **size_values(args)}
    if args.memory is not None:
        values["memory"] = args.memory
    if args.no_calibration:
        values["calibrate"] = False
    if args.no_online:
        values["online"] = False
    return values


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Refuse values below 1 of options that are given.

    Raises
    ------
    OptionError
        Names the option.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')}: {value}, expected 1 or more")


def shared_sidecar(model: Path, specs: Sequence[CacheSpec], args: argparse.Namespace) -> str | None:
    """The sidecar of the caches that want one, ``args.sidecar`` or the model's; made here when there is none.

    Returns
    -------
    str or None
        None where no cache wants it.

    Raises
    ------
    OptionError
        One is given, and no cache takes it.
    XkvError
        It cannot be used, or not be made.
    """
    from ..convert.pipeline import ensure_sidecar

    if not any(spec.wants_sidecar for spec in specs):
        if args.sidecar is not None:
            names = ", ".join(spec.name for spec in specs)
            raise OptionError(f"--sidecar: {args.sidecar}, but none of the caches {names} takes it; leave it out")
        return None
    return str(ensure_sidecar(model, args.sidecar, threads=args.threads))


def with_sidecar(spec: CacheSpec, sidecar: str | None) -> CacheSpec:
    """The same cache, with the sidecar if it wants one."""
    if sidecar is None or not spec.wants_sidecar:
        return spec
    return replace(spec, options={**spec.options, "sidecar": sidecar})


def size(text: str) -> int | str:
    """A size as it is written: a whole number becomes one."""
    return int(text) if text.isdecimal() else text
