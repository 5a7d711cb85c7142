"""``xkv-gguf eval``: what caches cost in accuracy, against the f16 cache on the same tokens."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .. import __version__
from ..base.files import check_writable, read_text, write_atomic
from ..base.partial import Partial
from ..base.pictures import check_picture
from ..errors import OptionError, XkvError
from ..lab.cache_spec import GRAMMAR, CacheSpec, parse_caches
from ..lab.eval_rows import Row, make_row, table
from ..model.demo_model import demo_model
from ..model.file import ModelFile, open_model
from ..model.fingerprint import model_fingerprint
from ..options import XkvOptions
from ..plan.cache_plan import N_BATCH

if TYPE_CHECKING:
    from ..llama import Llama

DEFAULT_CACHES = "f16,q8_0,q4_0,xkv"
DEFAULT_N_CTX = 8192
REFERENCE = CacheSpec("f16", "f16")


@dataclass(frozen=True)
class Text:
    """A text to score: its name, content, SHA-256, and the tokens once a model has made them."""

    name: str
    content: str
    sha256: str
    tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Plan:
    """What one run is to find out.

    Attributes
    ----------
    model : Path
    n_ctx, n_prefill, n_score : int
        Context, tokens of the prompt, and tokens scored after it.
    n_step : int
        Scored tokens in a batch.
    n_ubatch : int or None
        Tokens of a micro-batch; None leaves it to the plan of an xkv cache, and is llama.cpp's 512 for the others.
    threads : int or None
    scratch : Path
        Folder for the reference.
    keys : mapping
        What a row depends on, by the names of cache and text.
    """

    model: Path
    n_ctx: int
    n_prefill: int
    n_score: int
    n_step: int
    n_ubatch: int | None
    threads: int | None
    scratch: Path
    keys: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    @property
    def n_needed(self) -> int:
        """Tokens that a text has to have."""
        return self.n_prefill + self.n_score

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on besides model, text and cache."""
        names = ("n_ctx", "n_prefill", "n_score", "n_step", "n_ubatch", "threads")
        return {name: getattr(self, name) for name in names}

    @contextlib.contextmanager
    def open(self, spec: CacheSpec) -> Iterator[Llama]:
        """The model with an empty cache, freed at the end; errors name the cache that cannot be had."""
        from .. import Llama

        given: dict[str, Any] = {}
        if self.threads is not None:
            given |= dict.fromkeys(("n_threads", "n_threads_batch"), self.threads)
        if self.n_ubatch is not None:
            given["n_ubatch"] = self.n_ubatch
        try:
            llm = Llama(
                self.model,
                **spec.arguments,
                n_ctx=self.n_ctx,
                n_batch=max(self.n_ubatch or N_BATCH, self.n_step),
                verbose=False,
                **given,
            )
        except XkvError as error:
            raise type(error)(f"cache {spec.name}: {error}") from error
        try:
            yield llm
        finally:
            llm.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="GGUF file (default: the demo model)")
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
    parser.add_argument(
        "--caches",
        default=DEFAULT_CACHES,
        metavar="LIST",
        help=f"{GRAMMAR}, with commas between (default: %(default)s)",
    )
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
        default=64,
        metavar="N",
        help="scored tokens in a batch; 1 is as slow as decoding, and as exact a picture of it (default: %(default)s)",
    )
    parser.add_argument("--n-ubatch", type=int, metavar="N", help="micro-batch (default: 512, xkv: the plan's)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads (default: all that may be used, half of them to decode)"
    )


def run(args: argparse.Namespace) -> int:
    """Score, write the JSON file and the plot, and print the table."""
    specs = parse_caches(args.caches)
    for spec in specs:
        XkvOptions.of(spec.options)
    for name in ("n_ubatch", "score_batch", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')}: {value}, expected 1 or more")
    out, picture = Path(args.json), Path(args.plot) if args.plot is not None else None
    check_writable(out)
    if picture is not None:
        check_picture(picture)
    texts = read_texts(args.text)
    model = open_model(args.model if args.model is not None else demo_model())
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


def evaluate(plan: Plan, specs: Sequence[CacheSpec], texts: Sequence[Text], partial: Partial) -> list[Row]:
    """All rows, text by text; what `partial` has is taken from there.

    Parameters
    ----------
    plan : Plan
        With the keys of all rows.
    specs : sequence of CacheSpec
    texts : sequence of Text
        Without tokens.
    partial : Partial
        Takes each row as soon as it is there.

    Returns
    -------
    list of dict
        See `eval_rows.make_row`.
    """
    missing = {
        text.name: [spec for spec in specs if partial.get(**plan.keys[spec.name, text.name]) is None] for text in texts
    }
    todo = [text for text in texts if missing[text.name]]
    n_kept = len(plan.keys) - sum(map(len, missing.values()))
    if n_kept:
        print(f"{n_kept} of {len(plan.keys)} rows are taken from {partial.path}", file=sys.stderr)
    if todo:
        from ..runtime import log

        log.silence()
        todo = prepare(plan, [spec for spec in specs if any(spec in some for some in missing.values())], todo)
        n_runs = sum(1 + sum(spec.kv_mode != "f16" for spec in missing[text.name]) for text in todo)
        with tqdm(total=n_runs * plan.n_needed, unit="tok", disable=None) as bar:
            for text in todo:
                score_text(plan, missing[text.name], text, partial, bar)
    return [row for text in texts for spec in specs if (row := partial.get(**plan.keys[spec.name, text.name]))]


def prepare(plan: Plan, specs: Sequence[CacheSpec], texts: Sequence[Text]) -> list[Text]:
    """Make tokens of the texts, and open each cache once: what cannot work fails before the long part begins.

    Raises
    ------
    XkvError
        A text is too short, or a cache cannot be had.
    """
    found = []
    with plan.open(REFERENCE) as llm:
        for text in texts:
            tokens = llm.tokenize(text.content.encode())
            if len(tokens) < plan.n_needed:
                raise OptionError(
                    f"--text: {text.name} has {len(tokens)} tokens, {plan.n_needed} are needed; "
                    "give a longer one or a smaller --n-ctx"
                )
            found.append(replace(text, tokens=tokens[: plan.n_needed]))
    for spec in specs:
        if spec.kv_mode != "f16":
            with plan.open(spec):
                pass
    return found


def score_text(plan: Plan, specs: Sequence[CacheSpec], text: Text, partial: Partial, bar: Any) -> None:
    """Run f16 and then each cache over a text, one context at a time, and keep the rows."""
    from ..lab.metrics import summarize
    from ..lab.score import Reference, expectations

    scored = text.tokens[plan.n_prefill :]
    with contextlib.ExitStack() as stack:
        bar.set_description(f"{text.name}, f16")
        with plan.open(REFERENCE) as llm:
            reference = stack.enter_context(Reference(plan.n_score, llm.n_vocab(), plan.scratch))
            reference.fill(expectations(llm, text.tokens, plan.n_prefill, plan.n_step, bar.update))
            report = llm.kv_report()
        f16_bytes = report.total_bytes
        for spec in specs:
            if spec.kv_mode == "f16":
                scores = reference.compare(iter([reference.logits]), scored)
            else:
                bar.set_description(f"{text.name}, {spec.name}")
                with plan.open(spec) as llm:
                    scores = reference.compare(
                        expectations(llm, text.tokens, plan.n_prefill, plan.n_step, bar.update), scored
                    )
                    report = llm.kv_report()
            row = make_row(spec.name, text.name, report, f16_bytes, plan.n_score, summarize(scores))
            partial.put(row, **plan.keys[spec.name, text.name])


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


def make_keys(
    plan: Plan, fingerprint: str, specs: Sequence[CacheSpec], texts: Sequence[Text]
) -> dict[tuple[str, str], dict[str, Any]]:
    """What the row of each cache and text depends on, by their names.

    Raises
    ------
    XkvError
        The sidecar of an xkv cache cannot be used, or cannot be made where there is none.
    """
    from ..runtime import loader

    common = {**plan.settings, "model": fingerprint, "version": __version__, "build": loader.load().build_id}
    keys = {}
    for spec in specs:
        cache = {"cache": spec.name, "sidecar": _sidecar(plan, spec)}
        for text in texts:
            keys[spec.name, text.name] = {**common, **cache, "text": text.name, "sha256": text.sha256}
    return keys


def _sidecar(plan: Plan, spec: CacheSpec) -> list[Any] | None:
    """What tells a cache's sidecar from another one; it is made here when there is none."""
    if spec.kv_mode != "xkv" or spec.options.get("calibrate") is False:
        return None
    from ..convert.pipeline import ensure_sidecar

    path = ensure_sidecar(plan.model, spec.options.get("sidecar"), threads=plan.threads)
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]
