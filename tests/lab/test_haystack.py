from __future__ import annotations

import itertools
import re

import pytest

from xkv_gguf.errors import OptionError
from xkv_gguf.lab.haystack import build_haystack, make_needle, paragraphs


def count_words(text: str) -> int:
    return len(text.split())


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.)\s+", text)


def test_the_same_seed_gives_the_same_text() -> None:
    def head(seed: int) -> list[str]:
        return list(itertools.islice(paragraphs(seed), 20))

    assert head(5) == head(5)
    assert head(5) != head(6)


def test_no_sentence_comes_twice_and_few_share_their_beginning() -> None:
    text = build_haystack(count_words, 6000, [], []).text
    parts = sentences(text)
    assert len(parts) > 350
    assert len(set(parts)) == len(parts)
    # a short loop of templates would show as one most frequent beginning
    beginnings = [" ".join(part.split()[:3]) for part in parts]
    assert max(map(beginnings.count, beginnings)) <= 0.05 * len(parts)


def test_sentences_are_well_formed() -> None:
    for part in sentences(build_haystack(count_words, 4000, [], [], seed=2).text):
        assert part[0].isupper()
        assert part.endswith(".")
        assert "{" not in part and "  " not in part


def test_the_text_has_no_number_that_could_pass_for_a_needle() -> None:
    assert not re.search(r"\d", build_haystack(count_words, 6000, [], []).text)


@pytest.mark.parametrize("depth", [0.0, 0.05, 0.37, 0.5, 0.95, 1.0])
def test_the_needle_lies_at_its_depth_between_whole_sentences(depth: float) -> None:
    needle = make_needle(1)
    hay = build_haystack(count_words, 3000, [needle], [depth], seed=4)
    plain = build_haystack(count_words, 3000 - count_words(needle.sentence), [], [], seed=4)
    assert hay.text.count(needle.sentence) == 1
    at = hay.text.index(needle.sentence)
    assert abs(at / len(hay.text) - depth) < 0.02
    assert needle.sentence in sentences(hay.text)
    # only the needle differs
    assert re.sub(r"\s+", " ", hay.text.replace(needle.sentence, "")).strip() == re.sub(r"\s+", " ", plain.text)


def test_several_needles_keep_their_depths() -> None:
    needles = [make_needle(seed) for seed in range(4)]
    depths = [0.9, 0.1, 0.1, 0.5]
    hay = build_haystack(count_words, 3000, needles, depths)
    for needle, depth in zip(needles, depths, strict=True):
        assert abs(hay.text.index(needle.sentence) / len(hay.text) - depth) < 0.03


def test_the_length_is_what_was_asked_for_up_to_a_paragraph() -> None:
    hay = build_haystack(count_words, 2000, [make_needle(0)], [0.5])
    assert 2000 - 150 < hay.n_tokens <= 2000
    assert hay.n_tokens == count_words(hay.text)


def test_needles_differ_by_seed_and_have_the_digits_asked_for() -> None:
    assert len({make_needle(seed).answer for seed in range(50)}) == 50
    assert re.fullmatch(r"[1-9]\d{3}", make_needle(7, digits=4).answer)
    assert make_needle(7) == make_needle(7)


def test_an_answer_is_found_however_its_digits_are_grouped() -> None:
    needle = make_needle(3)
    grouped = f"{int(needle.answer):,}"
    assert needle.found_in(f"It is {needle.answer}.")
    assert needle.found_in(f"It is {grouped}.")
    assert not needle.found_in(f"It is {int(needle.answer) + 1}.")
    assert not needle.found_in("I do not know.")


@pytest.mark.parametrize(
    "n_tokens, depths, expected",
    [
        (3000, [1.5], "depth: 1.5, expected 0 to 1"),
        (3000, [float("nan")], "depth: nan"),
        (3000, [0.1, 0.2], "2 given for 1 needles"),
        (20, [0.5], "n_tokens: 20 is too small"),
    ],
)
def test_impossible_documents_are_refused(n_tokens: int, depths: list[float], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        build_haystack(count_words, n_tokens, [make_needle(0)], depths)


@pytest.mark.parametrize("digits", [0, 13])
def test_impossible_needles_are_refused(digits: int) -> None:
    with pytest.raises(OptionError, match="expected 1 to 12"):
        make_needle(0, digits=digits)
