"""The samples: the same everywhere, as long as asked for, with their answers in them."""

from __future__ import annotations

import hashlib
import itertools
import re

import pytest

from xkv_gguf.errors import OptionError
from xkv_gguf.lab.ruler.task import Sample, Stock, fit, largest, n_tokens, smallest
from xkv_gguf.lab.ruler.tasks import TASKS, parse_tasks
from xkv_gguf.lab.ruler.tasks_niah import KINDS
from xkv_gguf.lab.ruler.words import ADJECTIVES, NOUNS, VERBS

NAMES = sorted(TASKS)
OVERHEAD = 30  # for a chat format


def cost(sample: Sample) -> int:
    """A tokenizer of a sort: words of at most four letters, single digits, single signs."""
    texts = [sample.document, *(f"{turn.question} {turn.prefix}" for turn in sample.turns)]
    return sum(len(re.findall(r"[a-zA-Z]{1,4}|\S", text)) + OVERHEAD for text in texts)


def text_of(sample: Sample) -> str:
    turns = [f"{turn.question}|{turn.prefix}|{'|'.join(turn.references)}" for turn in sample.turns]
    return "\n".join([sample.document, *turns])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1024, 2048, 5000])
def test_samples_fill_their_length_and_never_exceed_it(name: str, length: int) -> None:
    task = TASKS[name]
    for index in range(4):
        sample = fit(task, length, 7, index, cost)
        assert 0.9 * length <= n_tokens(task, sample, cost) <= length, index


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_depends_on_task_length_seed_and_index_only(name: str) -> None:
    task = TASKS[name]

    def text(length: int, seed: int, index: int) -> str:
        return text_of(fit(task, length, seed, index, cost))

    assert text(1024, 0, 0) == text(1024, 0, 0)
    others = {text(1024, 0, 0), text(1024, 0, 1), text(1024, 1, 0), text(1100, 0, 0)}
    assert len(others) == 4


def test_the_samples_are_those_of_every_other_machine() -> None:
    texts = [text_of(fit(TASKS[name], length, 0, 0, cost)) for name in NAMES for length in (1024, 9000)]
    assert hashlib.sha256("\n\n".join(texts).encode()).hexdigest()[:16] == "ba7465bf5670a03f"


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_in_the_document_and_not_given_away(name: str) -> None:
    for index in range(3):
        sample = fit(TASKS[name], 1500, 0, index, cost)
        for turn in sample.turns:
            for reference in turn.references:
                assert reference in sample.document
                assert reference not in turn.question + turn.prefix


@pytest.mark.parametrize("name", sorted(KINDS))
def test_needles_are_whole_distinct_and_belong_to_the_keys_asked_for(name: str) -> None:
    kind = KINDS[name]
    sample = fit(TASKS[name], 3000, 0, 1, cost)
    found = re.findall(r"One of the special magic \w+ for (\S+) is (\S+)\.", sample.document)
    values = [value for _, value in found]
    assert len(set(values)) == len(values)
    if kind.haystack == "needles":
        assert len({key for key, _ in found}) == len(found) > 10
    else:
        assert len(found) == kind.n_keys * kind.n_values
    assert len(sample.turns) == (4 if name == "multiturn" else 1)
    asked = [re.findall(r" for (.+) in the text above", turn.question)[0] for turn in sample.turns]
    keys = list(itertools.chain(*(re.split(", | and ", text) for text in asked)))
    assert len(set(keys)) == kind.n_queries
    wanted = [value for key in keys for other, value in found if other == key]
    assert sorted(wanted) == sorted(value for turn in sample.turns for value in turn.references)


def test_needles_lie_anywhere() -> None:
    places = []
    for index in range(40):
        sample = fit(TASKS["niah_single_1"], 2048, 0, index, cost)
        places.append(sample.document.index(sample.turns[0].references[0]) / len(sample.document))
    assert min(places) < 0.15 and max(places) > 0.85
    assert 0.35 < sum(places) / len(places) < 0.65


def test_following_the_assignments_leads_to_the_variables() -> None:
    turn = fit(TASKS["vt"], 2048, 0, 0, cost).turns[0]
    document = fit(TASKS["vt"], 2048, 0, 0, cost).document
    value = re.findall(r"value (\d+)", turn.question)[0]
    reached = []
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", document):
        if source == value or source in reached:
            reached.append(name)
    assert tuple(reached) == turn.references
    assert len(reached) == 5
    # an example with another value comes first, with its answer
    assert document.index("Answer: ") < document.index(value)


@pytest.mark.parametrize("length, often, seldom", [(2048, 6, 1), (6000, 30, 3), (12000, 30, 3)])
def test_common_words_are_the_most_common(length: int, often: int, seldom: int) -> None:
    sample = fit(TASKS["cwe"], length, 0, 0, cost)
    # the example comes before the last list
    words = re.findall(r"\d+\. (\S+)", sample.document.rpartition("\n")[2])
    common = sample.turns[0].references
    assert len(common) == 10
    assert {words.count(word) for word in common} == {often}
    assert {words.count(word) for word in set(words) - set(common)} == {seldom}


@pytest.mark.parametrize("length", [600, 2048, 9000])
def test_frequent_words_are_the_most_frequent(length: int) -> None:
    sample = fit(TASKS["fwe"], length, 0, 0, cost)
    words = sample.document.split("most often. ")[1].split()
    counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
    assert counts[0][1] == "..."
    assert [word for _, word in counts[1:4]] == list(sample.turns[0].references)
    assert counts[3][0] > counts[4][0]


def test_no_word_is_part_of_another() -> None:
    words = [*ADJECTIVES, *NOUNS, *VERBS]
    # cwe at 8192 tokens needs some 700 where a word and its number take three tokens
    assert len(words) > 900
    assert not [(a, b) for a, b in itertools.permutations(words, 2) if a in b]


def test_a_length_that_is_too_short_is_refused_with_the_smallest() -> None:
    task = TASKS["vt"]
    needed = smallest(task, 300, 0, 0, cost)
    with pytest.raises(OptionError, match=f"--length: 300 is too short for the task vt, expected {needed} or more"):
        fit(task, 300, 0, 0, cost)
    assert n_tokens(task, fit(task, needed, 0, 0, cost), cost) <= needed


@pytest.mark.parametrize("step", [1, 7, 100])
@pytest.mark.parametrize("length", [60, 61, 999, 123456])
def test_the_largest_amount_is_found_in_few_calls(step: int, length: int) -> None:
    calls = 0

    def size(amount: int) -> int:
        nonlocal calls
        calls += 1
        return 50 + 3 * (amount // step) * step // 2

    found = largest(size, length, (2, size(2)), (4, size(4)))
    assert size(found) <= length < size(found + 1)
    assert calls < 40


def test_a_stock_keeps_what_it_has_given() -> None:
    stock = Stock(itertools.count())
    assert stock.first(3) == [0, 1, 2]
    stock.first(2).append(9)
    assert stock.first(4) == [0, 1, 2, 3]


def test_tasks_by_name() -> None:
    assert [task.name for task in parse_tasks("vt, cwe")] == ["vt", "cwe"]
    assert [task.name for task in parse_tasks("all")] == list(TASKS)
    assert len(TASKS) == 12
    assert [TASKS[name].n_answer for name in ("niah_single_1", "vt", "cwe", "fwe")] == [128, 30, 120, 50]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("niah_singel_1", "--tasks: 'niah_singel_1' is unknown, did you mean 'niah_single_1'"),
        ("qa_1", "--tasks: 'qa_1' is unknown"),
        ("vt,,cwe", "--tasks: '' is unknown"),
        ("vt,vt", "--tasks: 'vt' is given twice"),
    ],
)
def test_unknown_tasks_are_refused(text: str, expected: str) -> None:
    with pytest.raises(OptionError, match=re.escape(expected)):
        parse_tasks(text)
