"""``xkv-gguf ruler``: RULER's synthetic tasks on caches side by side."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import __version__
from ..base.files import check_writable, write_atomic
from ..base.partial import Partial, file_identity
from ..errors import OptionError
from ..lab.cache_spec import parse_caches
from ..lab.ruler.run import Plan, Runner
from ..lab.ruler.score import summarize, table
from ..lab.ruler.tasks import TASKS, parse_tasks
from ..model.file import ModelFile, open_model
from ..options import XkvOptions
from ._args import (
    add_caches,
    add_model,
    add_n_ubatch,
    add_sidecar,
    add_threads,
    check_counts,
    model_path,
    shared_sidecar,
    thread_settings,
    with_sidecar,
)

DEFAULT_CACHES = "f16,xkv"
DEFAULT_LENGTHS = "4096"
N_BATCH = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_model(parser)
    parser.add_argument(
        "--length",
        default=DEFAULT_LENGTHS,
        metavar="LIST",
        help="tokens of a prompt with room for its answer, with commas between (default: %(default)s)",
    )
    parser.add_argument("--tasks", default="all", metavar="LIST", help=f"all, or of {', '.join(TASKS)} (default: all)")
    add_caches(parser, DEFAULT_CACHES)
    parser.add_argument("--samples", type=int, default=10, metavar="N", help="per task and length (default: 10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: %(default)s)")
    parser.add_argument(
        "--json",
        metavar="OUT",
        help="write scores and answers to this file; OUT.partial keeps what an interrupted run did",
    )
    add_threads(parser)
    add_n_ubatch(parser)
    add_sidecar(parser, "xkv caches that name none")


def run(args: argparse.Namespace) -> int:
    """Run the tasks, print the table, and write the JSON file."""
    tasks = parse_tasks(args.tasks)
    caches = parse_caches(args.caches)
    for spec in caches:
        if spec.kv_mode == "xkv":
            XkvOptions.of(spec.options)
    check_counts(args, "samples", "threads", "n_ubatch")
    out = Path(args.json) if args.json is not None else None
    if out is not None:
        check_writable(out)
    model = open_model(model_path(args))
    lengths = parse_lengths(args.length, model)
    settings: dict[str, Any] = {"n_batch": max(N_BATCH, args.n_ubatch or 0)}
    if args.n_ubatch is not None:
        settings["n_ubatch"] = args.n_ubatch
    settings |= thread_settings(args.threads)
    sidecar = shared_sidecar(model.path, caches, args)
    caches = [with_sidecar(spec, sidecar) for spec in caches]
    plan = Plan(model.path, caches, tasks, lengths, args.samples, args.seed, settings)
    basis = _basis(plan, sidecar)
    partial = Partial(out, "ruler", basis, mixed=False)
    samples = _run(plan, partial)
    rows = summarize(samples)
    if out is not None:
        result = {
            "rows": rows,
            "model": {"name": model.path.name, "fingerprint": basis["model"]},
            "command": _command(args, model),
            "settings": {
                "lengths": lengths,
                "tasks": [task.name for task in tasks],
                "caches": [spec.name for spec in caches],
                "samples": args.samples,
                "seed": args.seed,
                "threads": args.threads,
                "n_ubatch": args.n_ubatch,
                "xkv_gguf": __version__,
                "build_id": basis["build_id"],
            },
            "samples": samples,
        }
        write_atomic(out, json.dumps(result, indent=1) + "\n")
        partial.remove()
    print(table(rows))
    return 0


def parse_lengths(text: str, model: ModelFile) -> list[int]:
    """Read a list such as ``4096,8192``: tokens, ascending, without repeats.

    Raises
    ------
    OptionError
        A length is no whole number, is not above 0, or exceeds the model's context.
    """
    lengths = []
    for word in text.split(","):
        try:
            length = int(word)
        except ValueError as error:
            raise OptionError(f"--length: {word.strip()!r} is no whole number") from error
        if length < 1:
            raise OptionError(f"--length: {length}, expected 1 or more")
        if model.n_ctx_train and length > model.n_ctx_train:
            raise OptionError(
                f"--length: {length}, expected at most {model.n_ctx_train}, the context of {model.path.name}"
            )
        lengths.append(length)
    return sorted(set(lengths))


def _basis(plan: Plan, sidecar: str | None) -> dict[str, Any]:
    """What every answer depends on, beside its cache, task, length and index."""
    from ..model.fingerprint import model_fingerprint
    from ..runtime import loader

    return {
        "model": model_fingerprint(plan.model),
        # the fingerprint leaves out the tokenizer and the chat template
        "model_bytes": plan.model.stat().st_size,
        "xkv_gguf": __version__,
        "build_id": loader.load().build_id,
        "seed": plan.seed,
        "settings": dict(plan.settings),
        "sidecar": None if sidecar is None else file_identity(Path(sidecar)),
    }


def _run(plan: Plan, partial: Partial) -> list[dict[str, Any]]:
    """All samples of the plan, with a progress bar over those that are missing."""
    from ..runtime import log

    log.silence()
    wanted = plan.sample_keys()
    done = sum(partial.get(**vars(key)) is not None for key in wanted)
    with tqdm(total=len(wanted), initial=done, desc="ruler", unit="sample", disable=None) as bar:
        try:
            return Runner(plan, partial, bar.update).run()
        except KeyboardInterrupt:
            if partial.path is not None and partial.n_taken + partial.n_put:
                print(f"\n{partial.path} keeps the finished samples: the same command goes on", file=sys.stderr)
            raise


def _command(args: argparse.Namespace, model: ModelFile) -> str:
    """The command line, with the model's name in place of its path."""
    words = ["xkv-gguf", "ruler", model.path.name]
    for option in ("length", "tasks", "caches", "samples", "seed", "json", "threads", "n_ubatch", "sidecar"):
        value = getattr(args, option)
        if value is not None:
            words += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join(words)
