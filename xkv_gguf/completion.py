"""What `llama_cpp.Llama` does with a context, where it has to be done otherwise: reading, drafts, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from .errors import DecodeError, OptionError
from .runtime.api import llama_cpp
from .runtime.sampling import check_grammar


class Completions(llama_cpp.Llama):
    """A `llama_cpp.Llama` that reads in batches, and lets a draft model work on prompts of any length.

    With a draft model, the parent keeps the logits of all tokens in an array that has no room for them. A draft needs
    those of its own tokens only, and only until it was compared with what is sampled: llama.cpp has them.

    Attributes
    ----------
    n_prompt_tokens : int
        Of the last call of `generate`.
    on_eval : callable or None
        See `Llama`.
    """

    n_prompt_tokens = 0
    on_eval: Callable[[int, int], object] | None = None
    _drafting = False  # whether what is evaluated now is a token with its draft
    _told: tuple[list[int], list[int]] = ([], [])  # prompt and answer of the last call of generate()

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those that the context holds.

        Raises
        ------
        DecodeError
            There is no room for them, a token does not exist, or the cache refused.
        """
        room = self._n_ctx - self.n_tokens
        if len(tokens) > room:
            raise DecodeError(f"{len(tokens)} tokens do not fit: the context of {self._n_ctx} has room for {room}")
        self._check_tokens("a batch", tokens, DecodeError)
        if self._drafting:
            tokens = tokens[: self.n_batch]  # a draft is a guess: what is left of it is made again
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        for start in range(0, len(tokens), self.n_batch):
            self._eval_batch(tokens[start : start + self.n_batch])
            if self.on_eval:
                self.on_eval(min(start + self.n_batch, len(tokens)), len(tokens))

    def _eval_batch(self, batch: Sequence[int]) -> None:
        """As a round of the parent's loop, but for drafts, whose logits stay where they are."""
        first, last = self.n_tokens, self.n_tokens + len(batch)
        self._batch.set_batch(batch=batch, n_past=first, logits_all=self._logits_all or self._drafting)
        self._ctx.decode(self._batch)
        self.input_ids[first:last] = batch
        if self._logits_all:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(batch) * self._n_vocab,))
            self.scores[first:last, :].reshape(-1)[::] = logits
        self.n_tokens = last
        self._requires_eval = False

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """Generate tokens after a prompt, as in `llama_cpp.Llama.generate`.

        Raises
        ------
        OptionError
            The prompt is empty, so that there is nothing to continue.
        """
        tokens = list(tokens)
        if not tokens and (self.n_tokens == 0 or kwargs.get("reset", True)):
            raise OptionError("prompt: no tokens, expected at least one")
        self.n_prompt_tokens = len(tokens)
        return self._generate(tokens, super().generate(tokens, *args, **kwargs))

    def _generate(self, prompt: list[int], parent: Any) -> Generator[int, Sequence[int] | None, None]:
        """The parent's tokens; between them, it evaluates one with its draft."""
        answer: list[int] = []
        self._told = (prompt, answer)
        more = None
        try:
            while True:
                try:
                    token = parent.send(more)
                except StopIteration:
                    return
                answer.append(token)
                self._drafting = False
                more = yield token
                self._drafting = self.draft_model is not None
        finally:
            self._drafting = False
            parent.close()

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if kwargs.get("logit_bias"):
            self._check_tokens("logit_bias", [int(token) for token in kwargs["logit_bias"]], OptionError)
        if kwargs.get("logprobs") is not None and self.draft_model is not None and not self._logits_all:
            raise OptionError("logprobs: with a draft model, they need a Llama that was made with logits_all=True")
        found: Iterator[Any] = super()._create_completion(*args, **kwargs)
        if kwargs.get("echo") and kwargs.get("logprobs") is not None and not kwargs.get("stream"):
            return (self._echoed(reply, kwargs["logprobs"]) for reply in found)
        return found

    def _echoed(self, reply: Any, n_top: int) -> Any:
        """A reply with the prompt's log-probabilities; without BOS, the parent's are those of the next token."""
        prompt, answer = self._told
        bos = self.token_bos()
        if not prompt or prompt[0] == bos:
            return reply
        n_answer = int(reply["usage"]["completion_tokens"])
        tokens = prompt + answer[:n_answer]
        rows = self.logits_to_logprobs(self.scores[: len(tokens) - 1])
        told = [self._text([token], tokens[:i]) for i, token in enumerate(tokens)]
        tops: list[dict[str, float] | None] = [None]
        for i, row in enumerate(rows):
            best = sorted(zip(row.tolist(), range(len(row)), strict=True), reverse=True)[:n_top]
            top = {self._text([token], tokens[: i + 1]): value for value, token in best}
            tops.append({**top, told[i + 1]: float(row[tokens[i + 1]])})
        kept = [i for i, token in enumerate(tokens) if token != bos]
        values = [None, *(float(row[token]) for row, token in zip(rows, tokens[1:], strict=True))]
        reply["choices"][0]["logprobs"] = {
            "tokens": [told[i] for i in kept],
            "text_offset": [len(self._text(tokens[:i])) for i in kept],
            "token_logprobs": [values[i] for i in kept],
            "top_logprobs": [tops[i] for i in kept],
        }
        return reply

    def _text(self, tokens: list[int], before: list[int] | None = None) -> str:
        return self.detokenize(tokens, prev_tokens=before).decode("utf-8", errors="ignore")

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Bytes of some tokens.

        Raises
        ------
        OptionError
            A token does not exist.
        """
        self._check_tokens("tokens", tokens, OptionError)
        return bytes(super().detokenize(tokens, prev_tokens=prev_tokens, special=special))

    def _init_sampler(self, *args: Any, **settings: Any) -> Any:
        """The parent's samplers; a grammar that does not parse raises OptionError."""
        if settings.get("grammar") is not None:
            check_grammar(self._model.vocab, settings["grammar"])
        return super()._init_sampler(*args, **settings)

    def _check_tokens(self, what: str, tokens: Sequence[int], kind: type[Exception]) -> None:
        # ids out of range abort the process in llama.cpp
        for token in (min(tokens), max(tokens)) if len(tokens) > 0 else ():
            if not 0 <= token < self._n_vocab:
                raise kind(f"{what}: token {token}, expected 0 to {self._n_vocab - 1}")
