from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xkv_gguf.convert.prompts import FORMS, OPENERS, TOPICS, request
from xkv_gguf.convert.sample import MIN_P, draw, repeats
from xkv_gguf.convert.text import cut_texts, read_texts, spread
from xkv_gguf.errors import CalibrationError, OptionError

BOS = 1000


def tokenize(text: str) -> list[int]:
    return [ord(c) for c in text]


def cut(texts: list[str], n_tokens: int, n_len: int, seed: int = 0) -> list[list[int]]:
    return cut_texts(texts, tokenize, [BOS], n_tokens, n_len, seed)


def test_sequences_have_the_length_and_number_asked_for() -> None:
    found = cut(["abc" * 3000, "xyz" * 3000], 2000, 100)
    assert [len(s) for s in found] == [100] * 20
    assert all(s[0] == BOS for s in found)
    letters = {chr(t) for s in found for t in s[1:]}
    assert letters == set("abcxyz")


def test_rest_is_filled_up_exactly() -> None:
    assert sum(map(len, cut(["a" * 5000], 1050, 100))) == 1050
    assert sum(map(len, cut(["a" * 350], 2000, 200))) == 350 + 2


def test_seed_chooses_the_passages() -> None:
    text = "".join(chr(32 + i % 90) for i in range(20000)) + "#" * 777
    assert cut([text], 1000, 100, 1) == cut([text], 1000, 100, 1)
    assert cut([text], 1000, 100, 1) != cut([text], 1000, 100, 2)


def test_very_long_texts_are_thinned_out_before_they_are_tokenized() -> None:
    seen = 0

    def counting(text: str) -> list[int]:
        nonlocal seen
        seen += len(text)
        return tokenize(text)

    found = cut_texts(["a" * 30_000_000, "b" * 30_000_000], counting, [], 20_000, 500, 0)
    assert sum(map(len, found)) == 20_000
    assert {chr(t) for s in found for t in s} == {"a", "b"}
    assert seen < 1_000_000


def test_spread() -> None:
    rng = np.random.default_rng(0)
    assert spread(5, 7, rng) == [0, 1, 2, 3, 4]
    for _ in range(20):
        found = spread(100, 10, rng)
        assert len(set(found)) == 10
        assert set(np.diff(found).tolist()) == {10}
        assert 0 <= found[0] < 10
        assert found[-1] < 100


def test_too_short() -> None:
    with pytest.raises(CalibrationError, match="201 tokens found, at least 256 expected"):
        cut(["a" * 200], 1000, 500)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"good \xff bad", r"is not UTF-8 text \(byte 5\)"),
    ],
)
def test_unusable_files(tmp_path: Path, data: bytes | None, match: str) -> None:
    path = tmp_path / "t.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(OptionError, match=match) as err:
        read_texts([path])
    assert str(path) in str(err.value)


def test_folder_as_text(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_texts([tmp_path])


def test_draw_follows_the_distribution() -> None:
    p = np.array([0.5, 0.3, 0.19, 0.005, 0.005])
    n = 20000
    logits = np.tile(np.log(p).astype(np.float32), (n, 1))
    uniform = (np.arange(n) + 0.5) / n
    counts = np.bincount(draw(logits, np.ones(n, np.float32), uniform), minlength=5)
    np.testing.assert_allclose(counts / n, np.array([0.5, 0.3, 0.19, 0, 0]) / 0.99, atol=1e-3)
    assert MIN_P > 0.005 / 0.5
    cold = draw(logits, np.full(n, 0.1, np.float32), uniform)
    assert (cold == 0).mean() > 0.98


def test_draw_at_the_ends_of_the_interval() -> None:
    logits = np.zeros((2, 8), np.float32)
    found = draw(logits, np.ones(2, np.float32), np.array([0.0, np.nextafter(1.0, 0.0)]))
    assert found.tolist() == [0, 7]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_draw_refuses_logits_that_are_not_finite(bad: float) -> None:
    logits = np.zeros((2, 8), np.float32)
    logits[1, 3] = bad
    with pytest.raises(CalibrationError, match="logits that are not finite"):
        draw(logits, np.ones(2, np.float32), np.zeros(2))


def test_repeats() -> None:
    assert repeats([1, 2, 3] * 30)
    assert not repeats([1, 2, 3] * 10)
    assert not repeats(list(range(100)))
    assert not repeats([5] * 40 + list(range(30)))


def test_prompts_differ_in_kind() -> None:
    assert len(OPENERS) >= 6
    texts = [text for kind in OPENERS.values() for text in kind]
    assert len(set(texts)) == len(texts)
    assert len(set(FORMS)) == len(FORMS)
    assert len(set(TOPICS)) == len(TOPICS)
    rng = np.random.default_rng(0)
    assert len({request(rng) for _ in range(200)}) > 150
