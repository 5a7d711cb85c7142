"""What a task and its samples are, and samples that fill a length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...errors import OptionError

T = TypeVar("T")
MAX_GUESSES = 6  # interpolated ones; then halves, which end in any case


@dataclass(frozen=True)
class Turn:
    """A question, how its answer begins, and what has to be in the answer.

    Attributes
    ----------
    question : str
    prefix : str
        First words of the answer, given to the model, so that it goes on with the answer itself (RULER does so too).
    references : tuple of str
        Strings to find in what follows the prefix.
    """

    question: str
    prefix: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A document and the questions about it, asked one after the other."""

    document: str
    turns: tuple[Turn, ...]


Builder = Callable[[int], Sample]
"""Makes a sample from the amount of haystack: more makes it longer, the same amount makes the same sample."""

Cost = Callable[[Sample], int]
"""Tokens of a sample with everything around it except the answers."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes
    ----------
    name : str
    n_answer : int
        Longest answer of each turn in tokens.
    least : int
        Smallest amount of haystack with which the task makes sense; its unit is the task's own.
    prepare : callable
        From a key, which seeds all that is random, and the length in tokens to a `Builder`.
    """

    name: str
    n_answer: int
    least: int
    prepare: Callable[[str, int], Builder]

    def builder(self, length: int, seed: int, index: int) -> Builder:
        """The builder of one sample."""
        return self.prepare(f"{self.name} {length} {seed} {index}", length)


class Stock(Generic[T]):
    """The first items of an endless iterator, as often as wanted."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._seen: list[T] = []

    def first(self, n: int) -> list[T]:
        """The first `n` items."""
        while len(self._seen) < n:
            self._seen.append(next(self._items))
        return self._seen[:n]


def n_tokens(task: Task, sample: Sample, cost: Cost) -> int:
    """Tokens of a sample with room for all its answers."""
    return cost(sample) + len(sample.turns) * task.n_answer


def smallest(task: Task, length: int, seed: int, index: int, cost: Cost) -> int:
    """Tokens of the smallest sample that the task would make for this length."""
    return n_tokens(task, task.builder(length, seed, index)(task.least), cost)


def fit(task: Task, length: int, seed: int, index: int, cost: Cost) -> Sample:
    """Make a sample that fills a length, answers included, without exceeding it.

    Parameters
    ----------
    task : Task
    length : int
        Tokens.
    seed, index : int
        Together with task and length, they determine the sample for a given tokenizer.
    cost : callable

    Returns
    -------
    Sample
        With as much haystack as fits.

    Raises
    ------
    OptionError
        Even the smallest sample is longer.
    """
    build = task.builder(length, seed, index)

    def size(amount: int) -> int:
        return n_tokens(task, build(amount), cost)

    least, shortest = task.least, size(task.least)
    if shortest > length:
        raise too_short(task, length, shortest)
    most = largest(size, length, (least, shortest), (2 * least, size(2 * least)))
    return build(most)


def largest(size: Callable[[int], int], length: int, low: tuple[int, int], probe: tuple[int, int]) -> int:
    """Largest amount whose size is at most `length`, in few calls: a size is costly and nearly linear in the amount.

    Parameters
    ----------
    size : callable
        From an amount to tokens.
    length : int
        Tokens.
    low, probe : tuple of int
        Two amounts with their sizes; that of `low` fits.

    Returns
    -------
    int
    """
    high: tuple[int, int] | None = None
    point = probe
    calls = 0
    while True:
        slope = max((point[1] - low[1]) / (point[0] - low[0]), 1e-3)
        if point[1] <= length:
            low = point
        else:
            high = point
        if high is not None and high[0] - low[0] <= 1:
            return low[0]
        guess = low[0] + max(1, int((length - low[1]) / slope))
        if high is None:
            guess = min(guess, 2 * low[0])
        else:
            guess = min(guess, high[0] - 1) if calls < MAX_GUESSES else (low[0] + high[0]) // 2
        point = guess, size(guess)
        calls += 1


def too_short(task: Task, length: int, needed: int) -> OptionError:
    """The error for a length that a task's smallest sample does not fit into."""
    return OptionError(f"--length: {length} is too short for the task {task.name}, expected {needed} or more")
