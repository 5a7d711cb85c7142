"""Scores caches on texts, against the f16 cache on the same tokens, which then pass in larger batches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .. import __version__
from ..base.partial import Partial, file_identity
from ..errors import OptionError, XkvError
from ..plan.wishes import N_BATCH
from .cache_spec import CacheSpec
from .eval_rows import Row, make_row

if TYPE_CHECKING:
    from ..llama import Llama

REFERENCE = CacheSpec("f16", "f16")

N_REFERENCE = 64
"""Scored tokens in a batch of the reference, at least.

With fewer queries, llama.cpp's attention on a CPU sums values of f16 in f16, which costs as much as a good cache does.
"""


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
        return {**{name: getattr(self, name) for name in names}, "n_reference": self.n_reference}

    @property
    def n_reference(self) -> int:
        """Scored tokens in a batch of the reference."""
        return max(self.n_step, N_REFERENCE)

    def is_reference(self, spec: CacheSpec) -> bool:
        """Whether a cache is scored as the reference is."""
        return spec == REFERENCE and self.n_step == self.n_reference

    @contextlib.contextmanager
    def open(self, spec: CacheSpec, n_least: int = 0) -> Iterator[Llama]:
        """The model with an empty cache, freed at the end; errors name the cache that cannot be had.

        `n_least` tokens fit a micro-batch.
        """
        from .. import Llama

        given: dict[str, Any] = {}
        if self.threads is not None:
            given |= dict.fromkeys(("n_threads", "n_threads_batch"), self.threads)
        if self.n_ubatch is not None:
            given["n_ubatch"] = max(self.n_ubatch, n_least)
        try:
            llm = Llama(
                self.model,
                **spec.arguments,
                n_ctx=self.n_ctx,
                n_batch=max(self.n_ubatch or N_BATCH, self.n_step, n_least),
                verbose=False,
                **given,
            )
        except XkvError as error:
            raise type(error)(f"cache {spec.name}: {error}") from error
        try:
            yield llm
        finally:
            llm.close()


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
        n_runs = sum(1 + sum(not plan.is_reference(spec) for spec in missing[text.name]) for text in todo)
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
    """Run the reference and then each cache over a text, one context at a time, and keep the rows."""
    from .metrics import summarize
    from .minicache import MergedLayers
    from .score import Reference, expectations

    scored = text.tokens[plan.n_prefill :]
    with contextlib.ExitStack() as stack:
        bar.set_description(f"{text.name}, reference")
        with plan.open(REFERENCE, plan.n_reference) as llm:
            reference = stack.enter_context(Reference(plan.n_score, llm.n_vocab(), plan.scratch))
            reference.fill(expectations(llm, text.tokens, plan.n_prefill, plan.n_reference, bar.update))
            report = llm.kv_report()
        f16_bytes = report.total_bytes
        for spec in specs:
            if plan.is_reference(spec):
                scores = reference.compare(iter([reference.logits]), scored)
            else:
                bar.set_description(f"{text.name}, {spec.name}")
                with plan.open(spec) as llm:
                    merged = MergedLayers(llm) if spec.is_minicache else None
                    run = (llm, text.tokens, plan.n_prefill, plan.n_step, bar.update)
                    scores = reference.compare(expectations(*run, merged) if merged else expectations(*run), scored)
                    report = merged.report(llm.kv_report()) if merged else llm.kv_report()
            row = make_row(spec.name, text.name, report, f16_bytes, plan.n_score, summarize(scores))
            partial.put(row, **plan.keys[spec.name, text.name])


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

    return file_identity(ensure_sidecar(plan.model, spec.options.get("sidecar"), threads=plan.threads))
