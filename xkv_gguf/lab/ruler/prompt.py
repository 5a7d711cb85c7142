"""Samples as tokens, in the model's chat format where it has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError
from ...runtime.api import llama_cpp
from .task import Sample, Turn

if TYPE_CHECKING:
    from ...llama import Llama

Message = dict[str, str]
ANSWER = "<answer of the turn before>"  # stands for an answer while the format of a later turn is found out


class Prompter:
    """Makes tokens of a sample's turns. An answer begins with the turn's prefix, which belongs to the prompt.

    Parameters
    ----------
    llm : Llama
        Its tokenizer and chat template are used, not its context.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._format = _formatter(llm)

    def first(self, sample: Sample) -> list[int]:
        """Tokens from the start to the prefix of the first answer."""
        turn = sample.turns[0]
        content = f"{sample.document}\n{turn.question}"
        if self._format is None:
            return self._llm.tokenize(f"{content} {turn.prefix}".encode(), add_bos=True)
        text = self._render([{"role": "user", "content": content}])
        return self._llm.tokenize((text + turn.prefix).encode(), add_bos=False, special=True)

    def following(self, turn: Turn) -> list[int]:
        """Tokens from the end of an answer to the prefix of the next one.

        Raises
        ------
        UnsupportedError
            The chat template does not show the answer that came before.
        """
        if self._format is None:
            return self._llm.tokenize(f"\n{turn.question} {turn.prefix}".encode(), add_bos=False)
        text = self._render(
            [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": ANSWER},
                {"role": "user", "content": turn.question},
            ]
        )
        _, found, rest = text.partition(ANSWER)
        if not found:
            raise UnsupportedError("the model's chat template does not keep earlier answers: leave out task multiturn")
        return self._llm.tokenize((rest + turn.prefix).encode(), add_bos=False, special=True)

    def cost(self, sample: Sample) -> int:
        """Tokens of all turns without the answers."""
        return len(self.first(sample)) + sum(len(self.following(turn)) for turn in sample.turns[1:])

    def _render(self, messages: list[Message]) -> str:
        assert self._format is not None
        try:
            return str(self._format(messages=messages).prompt)
        except ValueError as error:
            raise UnsupportedError(f"the model's chat template refuses the conversation: {error}") from error


def _formatter(llm: Llama) -> Any:
    """What renders the model's own chat template; None when it has none."""
    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        return None
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    def text_of(token: int) -> str:
        return str(llm._model.token_get_text(token)) if token != llama_cpp.LLAMA_TOKEN_NULL else ""

    return Jinja2ChatFormatter(template, eos_token=text_of(llm.token_eos()), bos_token=text_of(llm.token_bos()))
