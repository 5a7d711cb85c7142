"""Variable tracking: RULER's multi-hop tracing (section 3.2). One chain of five variables, hidden in noise."""

from __future__ import annotations

import itertools
import random
import string

from .task import Builder, Sample, Task, Turn
from .tasks_niah import NOISE

N_ANSWER = 30
N_HOPS = 4
N_LETTERS = 5
N_LETTERS_EXAMPLE = 3
SHORT = 4096  # below, the example is shorter
N_EXAMPLE_SHORT, N_EXAMPLE = 5, 10


def vt_task() -> Task:
    """The task; its amount counts repetitions of the noise."""
    return Task("vt", N_ANSWER, N_HOPS + 1, prepare)


def prepare(key: str, length: int) -> Builder:
    """The builder of one sample: an example with its answer, then the text in question."""
    rng = random.Random(key)
    names, value = _names(rng, N_LETTERS), _value(rng)
    # sorted draws from 0..1: where the assignments lie among the noise, in their order
    depths = sorted(rng.random() for _ in names)
    example_names, example_value = _names(rng, N_LETTERS_EXAMPLE), _value(rng)
    example_depths = sorted(rng.random() for _ in names)
    n_example = N_EXAMPLE_SHORT if length < SHORT else N_EXAMPLE
    example_text = _text(example_names, example_value, example_depths, n_example)
    turn = _turn(example_names, example_value)
    example = f"{example_text}\n{turn.question} {turn.prefix} {' '.join(turn.references)}\n\n"

    def build(amount: int) -> Sample:
        return Sample(example + _text(names, value, depths, amount), (_turn(names, value),))

    return build


def _names(rng: random.Random, n_letters: int) -> list[str]:
    names: list[str] = []
    while len(names) <= N_HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=n_letters))
        if name not in [*names, "VAR"]:
            names.append(name)
    return names


def _value(rng: random.Random) -> str:
    return str(rng.randint(10000, 99999))


def _text(names: list[str], value: str, depths: list[float], amount: int) -> str:
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {after} = VAR {before}" for before, after in itertools.pairwise(names)]
    lines = [NOISE] * amount
    for depth, line in reversed(list(zip(depths, chain, strict=True))):
        lines.insert(round(depth * amount), line)
    intro = "Assignments to variables are hidden in the text below. Memorize them and follow them from one to the next."
    return f"{intro}\n\n" + "\n".join(lines)


def _turn(names: list[str], value: str) -> Turn:
    return Turn(
        f"Question: Which variables have the value {value} in the text above? Name all of them.",
        f"Answer: By the assignments in the text above, {len(names)} variables have the value {value}:",
        tuple(names),
    )
