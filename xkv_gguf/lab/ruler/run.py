"""Samples on caches: one cache after another, one context per cache and length."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...base.partial import Partial
from ...errors import XkvError
from ..cache_spec import CacheSpec
from .score import string_match_all
from .task import Sample, Task, fit, n_tokens, smallest, too_short

if TYPE_CHECKING:
    from ...llama import Llama
    from .prompt import Prompter


@dataclass(frozen=True)
class Key:
    """Which sample on which cache."""

    cache: str
    task: str
    length: int
    index: int


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes
    ----------
    model : Path
    caches : sequence of CacheSpec
    tasks : sequence of Task
    lengths : sequence of int
        Tokens, answers included.
    n_samples : int
        Per task and length.
    seed : int
    settings : mapping
        Further arguments of `Llama`: threads, n_ubatch.
    """

    model: Path
    caches: Sequence[CacheSpec]
    tasks: Sequence[Task]
    lengths: Sequence[int]
    n_samples: int
    seed: int
    settings: Mapping[str, Any]

    def sample_keys(self) -> list[Key]:
        """All samples, in the order in which they are run."""
        return [
            Key(spec.name, task.name, length, index)
            for spec in self.caches
            for length in self.lengths
            for task in self.tasks
            for index in range(self.n_samples)
        ]


class Runner:
    """Runs a plan's samples, except those that are finished, and keeps what they gave.

    Parameters
    ----------
    plan : Plan
    partial : Partial
        Finished samples; new ones are added.
    tick : callable
        Called after each sample that was run.
    """

    def __init__(self, plan: Plan, partial: Partial, tick: Callable[[], object]) -> None:
        self._plan = plan
        self._partial = partial
        self._tick = tick
        self._samples: dict[tuple[str, int, int], Sample] = {}
        self._checked = False

    def run(self) -> list[dict[str, Any]]:
        """Run everything that is missing.

        Returns
        -------
        list of dict
            The plan's samples with cache, task, length, index, n_tokens (room of the answers included), cache_bytes,
            score (0 to 1), and turns with question, references, answer, score.

        Raises
        ------
        OptionError
            A length is too short for a task.
        XkvError
            See `Llama`; the text names the cache.
        """
        plan = self._plan
        finished = {key for key in plan.sample_keys() if self._partial.get(**vars(key)) is not None}
        for spec in plan.caches:
            for length in plan.lengths:
                missing = [
                    (task, index)
                    for task in plan.tasks
                    for index in range(plan.n_samples)
                    if Key(spec.name, task.name, length, index) not in finished
                ]
                if missing:
                    self._run_context(spec, length, missing)
        return [self._partial.get(**vars(key)) for key in plan.sample_keys()]

    def _run_context(self, spec: CacheSpec, length: int, missing: Sequence[tuple[Task, int]]) -> None:
        from .prompt import Prompter

        llm = self._open(spec, length)
        try:
            prompter = Prompter(llm)
            self._check_lengths(prompter)
            cache_bytes = llm.kv_report().total_bytes
            for task, index in missing:
                sample = self._sample(task, length, index, prompter)
                turns = answer(llm, prompter, sample, task.n_answer)
                key = vars(Key(spec.name, task.name, length, index))
                answered = {
                    **key,
                    "n_tokens": n_tokens(task, sample, prompter.cost),
                    "cache_bytes": cache_bytes,
                    "score": statistics.fmean(turn["score"] for turn in turns),
                    "turns": turns,
                }
                self._partial.put(answered, **key)
                self._tick()
        finally:
            llm.close()

    def _open(self, spec: CacheSpec, length: int) -> Llama:
        from ... import Llama

        try:
            return Llama(self._plan.model, **spec.arguments, n_ctx=length, verbose=False, **self._plan.settings)
        except XkvError as error:
            raise type(error)(f"cache {spec.name}: {error}") from error

    def _check_lengths(self, prompter: Prompter) -> None:
        """Refuse lengths that are too short for a task before any sample is run."""
        if self._checked:
            return
        plan = self._plan
        for length in plan.lengths:
            for task in plan.tasks:
                needed = max(smallest(task, length, plan.seed, index, prompter.cost) for index in range(plan.n_samples))
                if needed > length:
                    raise too_short(task, length, needed)
        self._checked = True

    def _sample(self, task: Task, length: int, index: int, prompter: Prompter) -> Sample:
        """The sample, made once for all caches."""
        key = task.name, length, index
        if key not in self._samples:
            self._samples[key] = fit(task, length, self._plan.seed, index, prompter.cost)
        return self._samples[key]


def answer(llm: Llama, prompter: Prompter, sample: Sample, n_answer: int) -> list[dict[str, Any]]:
    """Ask a sample's questions one after the other, on one cache that is empty at the start.

    Later questions are appended: the document and the earlier answers stay in the cache as they are.

    Parameters
    ----------
    llm : Llama
    prompter : Prompter
    sample : Sample
    n_answer : int
        Longest answer in tokens.

    Returns
    -------
    list of dict
        Per turn: question, references, answer, score.
    """
    llm.reset()
    llm._ctx.kv_cache_clear()
    tokens: list[int] = []
    turns = []
    for turn in sample.turns:
        tokens += prompter.following(turn) if tokens else prompter.first(sample)
        said = _greedy(llm, tokens, n_answer)
        tokens += said
        text = llm.detokenize(said).decode(errors="replace")
        turns.append(
            {
                "question": turn.question,
                "references": list(turn.references),
                "answer": text,
                "score": string_match_all(text, turn.references),
            }
        )
    return turns


def _greedy(llm: Llama, tokens: list[int], n_most: int) -> list[int]:
    """The most probable tokens up to one that ends the answer; what the context holds of `tokens` is kept."""
    from ...runtime.api import llama_cpp

    said: list[int] = []
    for token in llm.generate(tokens, temp=0.0):
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
            break
        said.append(token)
        if len(said) == n_most:
            break
    return said
