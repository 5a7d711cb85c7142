"""Calibration text from plain text files: the user's, and those of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from xkv_gguf.errors import CalibrationError, OptionError

MIN_TOKENS = 256
"""Fewer tokens than this are no calibration text."""

# No tokenizer packs more characters into a token on average, so this much text is always enough.
CHARS_PER_TOKEN = 16


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Contents of text files.

    Raises
    ------
    OptionError
        A file is missing, unreadable, empty or not UTF-8.
    """
    texts = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as err:
            raise OptionError(f"calibration text {path}: no such file") from err
        except UnicodeDecodeError as err:
            raise OptionError(f"calibration text {path}: is not UTF-8 text (byte {err.start})") from err
        except OSError as err:
            raise OptionError(f"calibration text {path}: cannot be read ({err.strerror})") from err
        if not text.strip():
            raise OptionError(f"calibration text {path}: is empty")
        texts.append(text)
    return texts


def package_texts() -> list[str]:
    """Contents of the package's texts: code, documents, and prose of many kinds, a little of it in other languages."""
    folder = Path(__file__).with_name("texts")
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]


def spread(total: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """Choose `wanted` of the numbers below `total`, evenly spread from a random start; all if there are fewer."""
    if wanted >= total:
        return list(range(total))
    start = rng.random()
    return [int((i + start) * total / wanted) for i in range(wanted)]


def cut_texts(
    texts: Sequence[str],
    tokenize: Callable[[str], list[int]],
    bos: Sequence[int],
    n_tokens: int,
    n_len: int,
    seed: int,
) -> list[list[int]]:
    """Cut texts into sequences of at most `n_len` tokens, at most `n_tokens` in all, spread evenly over the texts.

    Parameters
    ----------
    texts : sequence of str
    tokenize : callable
        Token ids of a text, without a first token added.
    bos : sequence of int
        Token ids that every sequence begins with.
    n_tokens, n_len : int
    seed : int
        Chooses the passages.

    Returns
    -------
    list of list of int
        The last one may be shorter; the same arguments give the same sequences.

    Raises
    ------
    CalibrationError
        There are fewer than `MIN_TOKENS` tokens.
    """
    rng = np.random.default_rng(seed)
    texts = _thin_out(texts, n_tokens * CHARS_PER_TOKEN, rng)
    room = n_len - len(bos)
    pieces: list[list[int]] = []
    for text in texts:
        ids = tokenize(text)
        pieces += [ids[i : i + room] for i in range(0, len(ids), room)]
    # ends of files are short: full pieces first, in order
    full = [p for p in pieces if len(p) == room]
    chosen = [full[i] for i in spread(len(full), -(-n_tokens // n_len), rng)]
    chosen += [p for p in pieces if len(p) < room]
    sequences: list[list[int]] = []
    missing = n_tokens
    for piece in chosen:
        if missing <= len(bos):
            break
        sequences.append([*bos, *piece[: missing - len(bos)]])
        missing -= len(sequences[-1])
    found = n_tokens - missing
    if found < MIN_TOKENS:
        raise CalibrationError(
            f"calibration text: {found} tokens found, at least {MIN_TOKENS} expected; pass more or longer files"
        )
    return sequences


def _thin_out(texts: Sequence[str], n_chars: int, rng: np.random.Generator) -> list[str]:
    """Of very long texts, keep slices of about `n_chars` characters in all."""
    total = sum(len(t) for t in texts)
    if total <= n_chars:
        return list(texts)
    slices = []
    size = 1 << 16
    for text in texts:
        n = -(-len(text) // size)
        slices += [text[i * size : (i + 1) * size] for i in spread(n, max(1, n * n_chars // total), rng)]
    return slices
