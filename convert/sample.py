"""Calibration text that the model writes itself.

Several sequences are written side by side, one token each per step. A sequence is a row of documents: an opener is fed
in, the model goes on from there, and when it ends the document or begins to repeat itself the next opener follows. The
openers differ in kind (prose, code, lists, dialogue, languages, maths; requests in the model's chat format if it has
one; single random tokens), so that the text covers more than the model's favourite subject.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.prompts import OPENERS, request
from xkv_gguf.errors import CalibrationError

TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1)
MIN_P = 0.02
REPEAT_WINDOW = 64
REPEAT_DISTINCT = 16
MAX_DOCUMENT = 384


def draw(
    logits: npt.NDArray[np.float32],
    temperature: npt.NDArray[np.float32],
    uniform: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    """Sample one token per row.

    Parameters
    ----------
    logits : ndarray of float32, shape (n, n_vocab)
    temperature : ndarray of float32, shape (n,)
    uniform : ndarray of float64, shape (n,)
        Numbers in [0, 1), the only source of randomness.

    Returns
    -------
    ndarray of int64, shape (n,)
        Tokens less than `MIN_P` times as likely as the likeliest are never drawn.

    Raises
    ------
    CalibrationError
        A row has no finite maximum.
    """
    top = logits.max(axis=1)
    if not np.isfinite(top).all():
        raise CalibrationError("the model computes logits that are not finite; its weights or its type are damaged")
    # few candidates pass, so the exponentials are cheap although vocabularies are long
    floor = top + temperature * np.float32(np.log(MIN_P))
    chosen = np.empty(len(logits), dtype=np.int64)
    for i, row in enumerate(logits):
        candidates = np.flatnonzero(row >= floor[i])
        cumulated = np.cumsum(np.exp((row[candidates] - top[i]).astype(np.float64) / temperature[i]))
        chosen[i] = candidates[np.searchsorted(cumulated, uniform[i] * cumulated[-1], side="right")]
    return chosen


def repeats(tokens: Sequence[int]) -> bool:
    """Whether the end of a document goes round in circles."""
    return len(tokens) >= REPEAT_WINDOW and len(set(tokens[-REPEAT_WINDOW:])) < REPEAT_DISTINCT


@dataclass
class _Writer:
    """One sequence that is being written."""

    temperature: float
    forced: deque[int] = field(default_factory=deque)
    document: list[int] = field(default_factory=list)
    ended: bool = True


class Openers:
    """An endless, seeded row of document beginnings as token ids, all kinds equally often."""

    def __init__(self, engine: Engine, rng: np.random.Generator) -> None:
        self._engine = engine
        self._rng = rng
        self._kinds: list[str] = []
        control = set(engine.control_tokens())
        self._plain_tokens = [i for i in range(engine.n_vocab) if i not in control]
        self._has_chat = engine.chat_prompt("Hello") is not None

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.next()

    def next(self) -> list[int]:
        """Token ids of the next opener."""
        if not self._kinds:
            # half of the documents are answers, if the model can answer
            chat = ["chat"] * (len(OPENERS) + 1) if self._has_chat else []
            self._kinds = [*OPENERS, "token", *chat]
            self._rng.shuffle(self._kinds)
        kind = self._kinds.pop()
        if kind == "token":
            return [*self._engine.bos(), int(self._rng.choice(self._plain_tokens))]
        if kind == "chat":
            prompt = self._engine.chat_prompt(request(self._rng))
            assert prompt is not None
            return self._engine.tokenize(prompt, special=True)
        texts = OPENERS[kind]
        return self._engine.bos() + self._engine.tokenize(texts[int(self._rng.integers(len(texts)))])


def write_text(
    engine: Engine,
    n_seq: int,
    n_len: int,
    rng: np.random.Generator,
    progress: Callable[[int], object],
) -> list[list[int]]:
    """Let the model write `n_seq` sequences of `n_len` tokens; afterwards all of them are in the context's cache.

    Parameters
    ----------
    engine : Engine
        With a context for `n_seq` sequences of `n_len` tokens, empty.
    n_seq, n_len : int
    rng : numpy.random.Generator
    progress : callable
        Gets the number of new tokens after each step.

    Returns
    -------
    list of list of int
        Token ids by sequence.

    Raises
    ------
    CalibrationError
        The model computes logits that are not finite.
    """
    openers = Openers(engine, rng)
    writers = [_Writer(TEMPERATURES[i % len(TEMPERATURES)]) for i in range(n_seq)]
    temperature = np.array([w.temperature for w in writers], dtype=np.float32)
    texts: list[list[int]] = [[] for _ in range(n_seq)]
    seqs = list(range(n_seq))
    drawn: npt.NDArray[np.int64] | None = None
    for pos in range(n_len):
        for i, writer in enumerate(writers):
            if writer.ended:
                writer.forced = deque(openers.next())
                writer.document = []
                writer.ended = False
            if writer.forced:
                token = writer.forced.popleft()
            else:
                assert drawn is not None
                token = int(drawn[i])
                writer.document.append(token)
                writer.ended = engine.is_end(token) or len(writer.document) >= MAX_DOCUMENT or repeats(writer.document)
            texts[i].append(token)
        engine.decode([text[-1] for text in texts], seqs, [pos] * n_seq, outputs=True)
        drawn = draw(engine.logits(n_seq), temperature, rng.random(n_seq))
        progress(n_seq)
    return texts
