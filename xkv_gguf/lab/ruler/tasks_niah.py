"""Needles in a haystack: RULER's eight retrieval tasks (section 3.1), and several turns about one document.

A needle gives a key's value. The haystack is ordinary text, a few sentences over and over, or other needles.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..haystack import paragraphs
from .task import Builder, Sample, Stock, Task, Turn
from .words import ADJECTIVES, NOUNS

N_ANSWER = 128
N_ANSWER_TURN = 32  # several turns: a number and the end of its sentence
N_TURNS = 4
LEAST = 4
N_DEPTHS = 40  # needles lie at distinct ones of so many even depths
NOISE = "The hills are high. The lake is cold. The road is long. On we walk. Out and home again."
SENTENCE_END = re.compile(r"(?<=\.)\s+")


@dataclass(frozen=True)
class Kind:
    """One configuration of the tasks (appendix B).

    Attributes
    ----------
    haystack : str
        "text", "noise" or "needles".
    key, value : str
        What keys and values are: "word", "number" or "uuid".
    n_keys, n_values : int
        Keys with needles, and values of each.
    n_queries : int
        Keys that are asked for.
    in_turns : bool
        Whether each key has a question of its own, in place of one for all.
    """

    haystack: str
    key: str = "word"
    value: str = "number"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1
    in_turns: bool = False


KINDS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("text"),
    "niah_single_3": Kind("text", value="uuid"),
    "niah_multikey_1": Kind("text", n_keys=4),
    "niah_multikey_2": Kind("needles"),
    "niah_multikey_3": Kind("needles", key="uuid", value="uuid"),
    "niah_multivalue": Kind("text", n_values=4),
    "niah_multiquery": Kind("text", n_keys=4, n_queries=4),
    "multiturn": Kind("text", n_keys=N_TURNS, n_queries=N_TURNS, in_turns=True),
}


def niah_tasks() -> list[Task]:
    """All tasks of this module."""
    return [
        Task(
            name,
            n_answer=N_ANSWER_TURN if kind.in_turns else N_ANSWER,
            least=LEAST,
            prepare=lambda key, length, kind=kind: prepare(kind, key),  # type: ignore[misc]
        )
        for name, kind in KINDS.items()
    ]


def prepare(kind: Kind, key: str) -> Builder:
    """The builder of one sample; its amount counts sentences, repetitions or needles."""
    facts = Stock(_facts(kind, random.Random(f"{key} facts")))
    chosen = facts.first(kind.n_keys * kind.n_values)
    keys = [name for name, _ in chosen[: kind.n_keys]]
    values = {name: [value for _, value in chosen[i :: kind.n_keys]] for i, name in enumerate(keys)}
    needles = [_needle(kind, name, value) for name in keys for value in values[name]]
    rng = random.Random(f"{key} places")
    rng.shuffle(needles)
    depths = sorted(rng.sample(range(N_DEPTHS), len(needles)))
    turns = _turns(kind, rng.sample(keys, kind.n_queries), values)
    hay = Stock(_hay(kind, key, facts, len(chosen)))

    def build(amount: int) -> Sample:
        pieces = hay.first(amount)
        for depth, needle in reversed(list(zip(depths, needles, strict=True))):
            pieces.insert(round(amount * depth / (N_DEPTHS - 1)), needle)
        separator = " " if kind.haystack == "text" else "\n"
        return Sample(f"{_intro(kind)}\n{separator.join(pieces)}", turns)

    return build


def _facts(kind: Kind, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield pairs of a key and a value; no key and no value comes twice."""
    seen: set[str] = set()

    def fresh(make: Callable[[random.Random], str]) -> str:
        while True:
            text = make(rng)
            if text not in seen:
                seen.add(text)
                return text

    while True:
        yield fresh(MAKERS[kind.key]), fresh(MAKERS[kind.value])


def _word(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


MAKERS = {"word": _word, "number": _number, "uuid": _uuid}


def _hay(kind: Kind, key: str, facts: Stock[tuple[str, str]], n_used: int) -> Iterator[str]:
    """Yield what lies around the needles, piece by piece."""
    if kind.haystack == "text":
        for paragraph in paragraphs(random.Random(f"{key} text").getrandbits(63)):
            yield from SENTENCE_END.split(paragraph)
    while kind.haystack == "noise":
        yield NOISE
    while True:
        n_used += 1
        yield _needle(kind, *facts.first(n_used)[-1])


def _needle(kind: Kind, key: str, value: str) -> str:
    return f"One of the special magic {kind.value}s for {key} is {value}."


def _intro(kind: Kind) -> str:
    if kind.n_queries * kind.n_values == 1:
        return f"A special magic {kind.value} is hidden in the text below. Memorize it: I will ask for it afterwards."
    return (
        f"Some special magic {kind.value}s are hidden in the text below. Memorize them: I will ask for them afterwards."
    )


def _turns(kind: Kind, queries: list[str], values: dict[str, list[str]]) -> tuple[Turn, ...]:
    if kind.in_turns:
        return tuple(_turn(kind, query, tuple(values[query])) for query in queries)
    subject = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])} and {queries[-1]}"
    return (_turn(kind, subject, tuple(value for query in queries for value in values[query])),)


def _turn(kind: Kind, subject: str, references: tuple[str, ...]) -> Turn:
    if len(references) == 1:
        question = f"What is the special magic {kind.value} for {subject} in the text above?"
        return Turn(question, f"The special magic {kind.value} for {subject} in the text above is", references)
    question = f"What are all the special magic {kind.value}s for {subject} in the text above?"
    return Turn(question, f"The special magic {kind.value}s for {subject} in the text above are", references)
