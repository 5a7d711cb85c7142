"""State files of `run` and `chat`: a prompt that was read, and a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError

if TYPE_CHECKING:
    from ..llama import Llama


class PromptCache:
    """The state after a prompt was read, in a file.

    Attributes
    ----------
    path : Path
    n_cached : int
        Tokens of the prompt that did not have to be read; known after `write`.
    """

    def __init__(self, llm: Llama, path: Path) -> None:
        self.path = path
        self.n_cached = 0
        self._llm = llm
        self._before: list[int] = []
        if path.exists():
            llm.load_file(path)
            self._before = list(llm.eval_tokens)

    def write(self) -> None:
        """Write the state again, unless the prompt is the one that it has."""
        tokens = list(self._llm.eval_tokens)
        same = (a == b for a, b in zip(self._before, tokens, strict=False))
        n_same = next((i for i, equal in enumerate(same) if not equal), min(len(self._before), len(tokens)))
        self.n_cached = min(n_same, len(tokens) - 1)  # the last one is read again, for its logits
        if tokens != self._before:
            self._llm.save_file(self.path)


class Session:
    """A conversation and the state of its context, in a file."""

    def __init__(self, llm: Llama, path: Path) -> None:
        self.path = path
        self._llm = llm

    def load(self) -> list[dict[str, str]] | None:
        """The messages, with the context as it was; None where there is no file yet.

        Raises
        ------
        StateError
            It is no session, or its state cannot be loaded.
        """
        if not self.path.exists():
            return None
        messages: Any = self._llm.load_file(self.path).extra.get("messages")
        if messages is None:
            raise StateError(f"state {self.path}: is no session of chat, but of a prompt; name another file")
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]

    def save(self, messages: list[dict[str, str]]) -> None:
        """Write both."""
        self._llm.save_file(self.path, {"messages": messages})
