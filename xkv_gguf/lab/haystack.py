"""Long documents with facts hidden in them, made from a seed.

The text is put together from the templates in `haystack_text`, so it needs no data set, is the same on every
machine, and is no part of any calibration text. No sentence comes twice in a document.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import OptionError
from .haystack_text import OPENINGS, SCENES, WORDS, Scene

SENTENCES_PER_PARAGRAPH = (4, 7)
# distinct sentences are drawn at random; this many repeats in a row mean that a scene is used up
MAX_REPEATS = 200


@dataclass(frozen=True)
class Needle:
    """A fact to hide in a document.

    Attributes
    ----------
    subject : str
        What the fact is about, for example a city.
    answer : str
        The text that an answer must contain.
    sentence : str
        The sentence that states the fact.
    question : str
        The question whose answer the fact is.
    """

    subject: str
    answer: str
    sentence: str
    question: str

    def found_in(self, text: str) -> bool:
        """Whether `text` holds the answer; separators inside numbers do not matter."""
        return self.answer.lower() in text.lower().replace(",", "")


@dataclass(frozen=True)
class Haystack:
    """A document with needles in it.

    Attributes
    ----------
    text : str
        The document; paragraphs are separated by blank lines.
    needles : tuple of Needle
        The hidden facts, in the order of `depths`.
    depths : tuple of float
        Where each fact was asked for: 0 is the start of the document and 1 its end.
    n_tokens : int
        Length of `text` by the caller's count.
    """

    text: str
    needles: tuple[Needle, ...]
    depths: tuple[float, ...]
    n_tokens: int

    def prompt(self, index: int = 0) -> str:
        """The document with the question about one of its needles, as a message to a chat model."""
        return (
            "A special magic number is hidden in the following text. Memorize it.\n\n"
            f"{self.text}\n\n{self.needles[index].question} Answer with the number."
        )


def make_needle(seed: int, digits: int = 7) -> Needle:
    """Make a fact of the form "the special magic number for Lisbon is 4071953".

    Parameters
    ----------
    seed : int
        Picks the city and the number.
    digits : int
        Length of the number, 1 to 12.

    Returns
    -------
    Needle

    Raises
    ------
    OptionError
        `digits` is out of range.
    """
    if not 1 <= digits <= 12:
        raise OptionError(f"digits: {digits}, expected 1 to 12")
    rng = random.Random(f"needle {seed}")
    city = rng.choice(WORDS["city"])
    number = str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    return Needle(
        subject=city,
        answer=number,
        sentence=f"The special magic number for {city} is {number}.",
        question=f"What is the special magic number for {city}?",
    )


def paragraphs(seed: int) -> Iterator[str]:
    """Yield paragraphs without end, each about one scene, no sentence twice.

    Parameters
    ----------
    seed : int
        The same seed gives the same text.

    Yields
    ------
    str
        One paragraph of 4 to 7 sentences.
    """
    rng = random.Random(f"paragraphs {seed}")
    seen: set[str] = set()
    order: list[Scene] = []
    while True:
        if not order:
            order = rng.sample(SCENES, len(SCENES))
        paragraph = _paragraph(rng, order.pop(), seen)
        if paragraph:
            yield paragraph


def build_haystack(
    count_tokens: Callable[[str], int],
    n_tokens: int,
    needles: Sequence[Needle],
    depths: Sequence[float],
    seed: int = 0,
) -> Haystack:
    """Build a document of about `n_tokens` tokens with each needle at its depth.

    Parameters
    ----------
    count_tokens : callable
        Number of tokens of a text, by the model's own tokenizer.
    n_tokens : int
        Wished length; the document ends with the last whole paragraph that fits.
    needles : sequence of Needle
        Facts to hide; each becomes a sentence between two others.
    depths : sequence of float
        One depth in 0..1 per needle.
    seed : int
        Seed of the text around the needles: the same for all depths, so that only the needle moves.

    Returns
    -------
    Haystack

    Raises
    ------
    OptionError
        A depth is outside 0..1, the counts differ, or `n_tokens` is too small for one paragraph.
    """
    if len(needles) != len(depths):
        raise OptionError(f"depths: {len(depths)} given for {len(needles)} needles, expected one each")
    for depth in depths:
        if not 0.0 <= depth <= 1.0:
            raise OptionError(f"depth: {depth}, expected 0 to 1")

    budget = n_tokens - sum(count_tokens(" " + needle.sentence) for needle in needles)
    chosen: list[str] = []
    for paragraph in paragraphs(seed):
        cost = count_tokens(paragraph + "\n\n")
        if cost > budget:
            break
        budget -= cost
        chosen.append(paragraph)
    if not chosen:
        raise OptionError(f"n_tokens: {n_tokens} is too small for one paragraph and {len(needles)} needles")

    text = _insert("\n\n".join(chosen), needles, depths)
    return Haystack(text=text, needles=tuple(needles), depths=tuple(depths), n_tokens=count_tokens(text))


def _paragraph(rng: random.Random, scene: Scene, seen: set[str]) -> str:
    """One paragraph about `scene`, empty when the scene is used up; adds its sentences to `seen`."""
    n_sentences = rng.randint(*SENTENCES_PER_PARAGRAPH)
    # people and places stay the same within a paragraph, so that it reads as one account
    fixed = {slot: rng.choice(WORDS[slot]) for slot in ("person", "village")}
    out: list[str] = []
    for template in rng.sample(scene.templates, min(n_sentences, len(scene.templates))):
        sentence = _fresh_sentence(rng, template, fixed, seen)
        if sentence is None:
            continue
        seen.add(sentence)
        if out:
            sentence = sentence[0].upper() + sentence[1:]
        else:
            # only names keep their capital inside a sentence
            first = sentence[0] if template.startswith("{person}") else sentence[0].lower()
            sentence = f"{rng.choice(OPENINGS)} {first}{sentence[1:]}"
        out.append(sentence)
    return " ".join(out)


def _fresh_sentence(rng: random.Random, template: str, fixed: dict[str, str], seen: set[str]) -> str | None:
    """Fill `template` with words so that the sentence is not in `seen`; None when that keeps failing."""
    for _ in range(MAX_REPEATS):
        words = {slot: rng.choice(choices) for slot, choices in WORDS.items()}
        sentence = template.format(**{**words, **fixed})
        if sentence not in seen:
            return sentence
        fixed = {slot: rng.choice(WORDS[slot]) for slot in fixed}
    return None


def _insert(text: str, needles: Sequence[Needle], depths: Sequence[float]) -> str:
    """Put each needle's sentence at the sentence end that is nearest to its depth."""
    ends = [i + 1 for i, ch in enumerate(text[:-1]) if ch == "." and text[i + 1] in " \n"]
    ends = [0, *ends, len(text)]
    places = []
    for needle, depth in zip(needles, depths, strict=True):
        wanted = depth * len(text)
        places.append((min(ends, key=lambda end: abs(end - wanted)), needle.sentence))
    for place, sentence in sorted(places, key=lambda item: item[0], reverse=True):
        before, after = text[:place], text[place:]
        text = f"{sentence} {after}" if place == 0 else f"{before} {sentence}{after}"
    return text
