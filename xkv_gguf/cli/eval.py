"""``xkv-gguf eval``: what caches cost in accuracy, against the f16 cache on the same tokens."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import __version__
from ..base.files import check_writable, read_text, write_atomic
from ..base.partial import Partial
from ..base.pictures import check_picture
from ..errors import OptionError
from ..lab.cache_spec import parse_caches
from ..lab.eval import REFERENCE, Plan, Text, evaluate, make_keys
from ..lab.eval_rows import table
from ..model.file import ModelFile, open_model
from ..model.fingerprint import model_fingerprint
from ..options import XkvOptions
from ._args import add_caches, add_model, add_n_ubatch, add_threads, check_counts, model_path

DEFAULT_CACHES = "f16,q8_0,q4_0,xkv"
DEFAULT_N_CTX = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_model(parser)
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="texts in UTF-8; of each, the first n_ctx tokens are used",
    )
    parser.add_argument("--json", required=True, metavar="OUT", help="write the figures to this file")
    parser.add_argument("--plot", metavar="PICTURE", help="draw divergence against bytes into a .png, .svg or .pdf")
    add_caches(parser, DEFAULT_CACHES)
    parser.add_argument(
        "--n-ctx",
        type=int,
        metavar="N",
        help=f"context in tokens (default: {DEFAULT_N_CTX}, at most what the model was trained with)",
    )
    parser.add_argument(
        "--n-score", type=int, default=512, metavar="N", help="tokens scored after the prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--prefill", type=int, metavar="N", help="tokens of the prompt (default: n_ctx less the scored tokens)"
    )
    parser.add_argument(
        "--score-batch",
        type=int,
        default=8,
        metavar="N",
        help="scored tokens in a batch; up to 8 an xkv cache computes as when it decodes (default: %(default)s)",
    )
    add_n_ubatch(parser)
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Score, write the JSON file and the plot, and print the table."""
    specs = parse_caches(args.caches, baselines=True)
    for spec in specs:
        XkvOptions.of(spec.options)
    check_counts(args, "n_ubatch", "score_batch", "threads")
    out, picture = Path(args.json), Path(args.plot) if args.plot is not None else None
    check_writable(out)
    if picture is not None:
        check_picture(picture)
    texts = read_texts(args.text)
    model = open_model(model_path(args))
    plan = make_plan(args, model, out.absolute().parent)
    partial = Partial(out, "eval")
    fingerprint = model_fingerprint(model.path)
    plan = replace(plan, keys=make_keys(plan, fingerprint, specs, texts))
    try:
        rows = evaluate(plan, specs, texts, partial)
    except KeyboardInterrupt:
        kept = sum(partial.get(**key) is not None for key in plan.keys.values())
        note = f"; the same command goes on from {partial.path}" if kept else ""
        print(f"\n{kept} of {len(plan.keys)} rows are done{note}", file=sys.stderr, end="")
        raise
    result = {
        "model": {"name": model.path.name, "architecture": model.architecture, "fingerprint": fingerprint},
        "command": command(args, plan),
        "version": __version__,
        "settings": {**plan.settings, "reference": REFERENCE.name},
        "rows": rows,
    }
    write_atomic(out, json.dumps(result, indent=1) + "\n")
    partial.remove()
    if picture is not None:
        from ..lab.eval_plot import plot_rows

        plot_rows(rows, picture, f"{model.path.name}, n_ctx {plan.n_ctx}, {plan.n_score} tokens scored")
    print(table(rows))
    return 0


def read_texts(paths: Sequence[str]) -> list[Text]:
    """Read the texts; a text's name is its file's without the ending.

    Raises
    ------
    OptionError
        A file cannot be read, is not UTF-8 or is empty, or two of them have the same name.
    """
    texts: dict[str, Text] = {}
    for path in paths:
        name = Path(path).stem
        if name in texts:
            raise OptionError(f"--text: two files are named {name!r}, which names the rows; rename one")
        content = read_text(path)
        if not content.strip():
            raise OptionError(f"--text: {path} is empty")
        texts[name] = Text(name, content, hashlib.sha256(content.encode()).hexdigest())
    return list(texts.values())


def make_plan(args: argparse.Namespace, model: ModelFile, scratch: Path) -> Plan:
    """Settle the numbers of tokens.

    Raises
    ------
    OptionError
        The context is larger than the model's, or prompt and scored tokens do not fit into it.
    """
    most = model.n_ctx_train
    n_ctx = args.n_ctx if args.n_ctx is not None else min(DEFAULT_N_CTX, most or DEFAULT_N_CTX)
    if n_ctx < 2 or (most and n_ctx > most):
        trained = f"{most}, which {model.path.name} was trained with" if most else "what the model was trained with"
        raise OptionError(f"--n-ctx: {n_ctx}, expected 2 to {trained}")
    if not 1 <= args.n_score < n_ctx:
        raise OptionError(f"--n-score: {args.n_score}, expected 1 to {n_ctx - 1} (n_ctx {n_ctx} less one token)")
    n_prefill = n_ctx - args.n_score if args.prefill is None else args.prefill
    if not 1 <= n_prefill <= n_ctx - args.n_score:
        raise OptionError(
            f"--prefill: {n_prefill}, expected 1 to {n_ctx - args.n_score} (n_ctx {n_ctx} less {args.n_score} scored)"
        )
    return Plan(model.path, n_ctx, n_prefill, args.n_score, args.score_batch, args.n_ubatch, args.threads, scratch)


def command(args: argparse.Namespace, plan: Plan) -> str:
    """A command line that finds the same figures, paths as they were given."""
    words = ["xkv-gguf", "eval", *([args.model] if args.model is not None else []), "--caches", args.caches]
    for option, value in (
        ("--n-ctx", plan.n_ctx),
        ("--n-score", plan.n_score),
        ("--prefill", args.prefill),
        ("--score-batch", plan.n_step),
        ("--n-ubatch", plan.n_ubatch),
        ("--threads", plan.threads),
    ):
        words += [option, str(value)] if value is not None else []
    return shlex.join([*words, "--text", *args.text, "--json", args.json])
