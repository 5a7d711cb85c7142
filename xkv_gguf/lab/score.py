"""Runs a model over tokens that are given and hands out what it expects each of them to be."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .metrics import Scores, join, score

if TYPE_CHECKING:
    from ..llama import Llama

Logits = npt.NDArray[np.float32]


def expectations(
    llm: Llama,
    tokens: Sequence[int],
    n_prefill: int,
    n_step: int,
    advance: Callable[[int], object],
    after_prompt: Callable[[], object] = lambda: None,
) -> Iterator[Logits]:
    """Feed a text and give the logits for its tokens from `n_prefill` on.

    The first `n_prefill` tokens go through as a prompt; the rest goes through `n_step` tokens at a time. Row i is the
    distribution at the token before token ``n_prefill + i``, so the first one is that at the prompt's end, and what
    is expected after the last token is left out.

    Parameters
    ----------
    llm : Llama
        With an empty context and room for all tokens.
    tokens : sequence of int
    n_prefill : int
        1 or more, and less than ``len(tokens)``.
    n_step : int
        At most the context's n_batch.
    advance : callable
        Called with the number of tokens after each batch.
    after_prompt : callable
        Called between the prompt and the rest.

    Yields
    ------
    array of float32, shape (n, n_vocab)
        The model's memory: valid until the next one is asked for.

    Raises
    ------
    DecodeError
        The cache refused a batch.
    """
    for start in range(0, n_prefill, llm.n_batch):
        batch = tokens[start : min(start + llm.n_batch, n_prefill)]
        llm.eval(batch)
        advance(len(batch))
    yield _logits(llm, 1)
    after_prompt()
    for start in range(n_prefill, len(tokens), n_step):
        batch = tokens[start : start + n_step]
        _eval_all(llm, batch)
        advance(len(batch))
        n = min(len(batch), len(tokens) - 1 - start)
        if n > 0:
            yield _logits(llm, n)


class Reference:
    """The exact cache's logits for the scored tokens of a text, on disk.

    They are kept as the model gave them, so that scoring them against themselves gives 0.

    Parameters
    ----------
    n_score, n_vocab : int
    folder : Path
        Where the file lies. It has no name, so that nothing is left behind however the process ends.
    """

    def __init__(self, n_score: int, n_vocab: int, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
        self.logits: Logits = np.memmap(self._file, dtype=np.float32, mode="w+", shape=(n_score, n_vocab))

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk space back."""
        self.logits = np.empty((0, 0), dtype=np.float32)
        self._file.close()

    def fill(self, batches: Iterator[Logits]) -> None:
        """Keep all logits of a run."""
        at = 0
        for batch in batches:
            self.logits[at : at + len(batch)] = batch
            at += len(batch)

    def compare(self, batches: Iterator[Logits], tokens: Sequence[int]) -> Scores:
        """Score a run of another cache.

        Parameters
        ----------
        batches : iterator of array, shape (n, n_vocab)
        tokens : sequence of int
            The scored tokens, as many as there are rows in all batches.

        Returns
        -------
        Scores
        """
        truth = np.asarray(tokens)
        parts = []
        at = 0
        for batch in batches:
            rows = slice(at, at + len(batch))
            parts.append(score(self.logits[rows], batch, truth[rows]))
            at += len(batch)
        return join(parts)


def _eval_all(llm: Any, batch: Sequence[int]) -> None:
    """`Llama.eval` of one batch with logits for all its tokens, without room for those of the whole context."""
    llm._batch.set_batch(batch=batch, n_past=llm.n_tokens, logits_all=True)
    llm._ctx.decode(llm._batch)
    llm.input_ids[llm.n_tokens : llm.n_tokens + len(batch)] = batch
    llm.n_tokens += len(batch)


def _logits(llm: Any, n: int) -> Logits:
    """The first `n` rows of logits of the last batch; after `Llama.eval`, there is one, of its last token."""
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(n, llm.n_vocab()))
