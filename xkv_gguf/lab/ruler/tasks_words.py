"""Common words and frequent words: RULER's aggregation tasks (section 3.3)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator

from .task import Builder, Sample, Stock, Task, Turn
from .words import ADJECTIVES, NOUNS, VERBS

N_ANSWER_CWE = 120
N_COMMON = 10
SHORT = 4096  # below, words are repeated less often
PLAIN = 8192  # up to here, plain words suffice; above, all words have two parts
N_PAIRS = 20000  # above so many, words have three parts

N_ANSWER_FWE = 50
ALPHA = 2.0
ZETA = math.pi**2 / 6  # zeta(ALPHA)
N_FREQUENT = 3
N_LETTERS = 6
NOISE = "..."


def words_tasks() -> list[Task]:
    """Both tasks. The amount counts uncommon words in cwe, and words in fwe.

    Below 100 words, the third and the fourth frequent word would come equally often.
    """
    return [
        Task("cwe", N_ANSWER_CWE, N_COMMON, prepare_cwe),
        Task("fwe", N_ANSWER_FWE, 100, prepare_fwe),
    ]


def prepare_cwe(key: str, length: int) -> Builder:
    """Numbered words, ten of which come most often: an example with its answer, then the list in question."""
    words = Stock(_words(random.Random(f"{key} words"), length))
    # words of the example, then the common ones, then the others
    if length < SHORT:
        n_example, often_example, seldom_example, often, seldom = 20, 3, 1, 6, 1
    else:
        n_example, often_example, seldom_example, often, seldom = 40, 10, 3, 30, 3
    example_words = words.first(n_example)
    example_list = _numbered(f"{key} example", example_words, often_example, seldom_example)
    example_turn = _turn_cwe(example_words[:N_COMMON])
    answer = _listed(example_words[:N_COMMON])
    example = f"{_ask_cwe(example_list)}\n{example_turn.question} {example_turn.prefix} {answer}\n\n"

    def build(amount: int) -> Sample:
        chosen = words.first(n_example + N_COMMON + amount)[n_example:]
        return Sample(example + _ask_cwe(_numbered(key, chosen, often, seldom)), (_turn_cwe(chosen[:N_COMMON]),))

    return build


def prepare_fwe(key: str, length: int) -> Builder:
    """Made-up words whose frequencies fall with the square of their rank; dots have the first rank."""
    rng = random.Random(f"{key} words")
    vocabulary = [NOISE]
    while len(vocabulary) < max(length // 50, 2 * N_FREQUENT):
        word = "".join(rng.choices(string.ascii_lowercase, k=N_LETTERS))
        if word not in vocabulary:
            vocabulary.append(word)
    turn = Turn(
        "Question: Which three coded words come most often in the coded text above? Leave out the dots '...', and "
        "explain nothing.",
        "Answer: The three coded words that come most often are:",
        tuple(vocabulary[1 : N_FREQUENT + 1]),
    )

    def build(amount: int) -> Sample:
        text: list[str] = []
        for rank, word in enumerate(vocabulary, start=1):
            text += [word] * int(amount * rank**-ALPHA / ZETA)
        random.Random(f"{key} order").shuffle(text)
        intro = (
            "Read the coded text below and count how often each coded word comes. Find the three that come most often."
        )
        return Sample(f"{intro} {' '.join(text)}", (turn,))

    return build


def _words(rng: random.Random, length: int) -> Iterator[str]:
    """Yield distinct words without end, of the same form as far as a length needs them."""
    if length <= PLAIN:
        plain = [*ADJECTIVES, *NOUNS, *VERBS]
        yield from rng.sample(plain, len(plain))
    seen: set[str] = set()
    while True:
        parts = [rng.choice(ADJECTIVES), rng.choice(NOUNS)]
        if len(seen) >= N_PAIRS:
            parts.insert(0, rng.choice(ADJECTIVES))
        word = "-".join(parts)
        if word not in seen:
            seen.add(word)
            yield word


def _numbered(key: str, words: list[str], often: int, seldom: int) -> str:
    text = words[:N_COMMON] * often + words[N_COMMON:] * seldom
    random.Random(f"{key} order").shuffle(text)
    return _listed(text)


def _listed(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _ask_cwe(numbered: str) -> str:
    return (
        "Below is a numbered list of words, some of which come more often than others. Memorize those that come most "
        f"often.\n{numbered}"
    )


def _turn_cwe(common: list[str]) -> Turn:
    return Turn(
        "Question: Which 10 words come most often in the list above?",
        "Answer: The 10 words that come most often in the list are:",
        tuple(common),
    )
