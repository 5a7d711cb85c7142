"""Answers piece by piece: llama_cpp's chunks as plain text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..llama import Llama

Piece = tuple[str, str | None]
"""A text, which may be empty, and the reason for the end with the last one."""


def chat_pieces(llm: Llama, messages: list[dict[str, str]], **settings: Any) -> Iterator[Piece]:
    """Answer a conversation; `settings` are those of `create_chat_completion`."""
    chunks: Any = llm.create_chat_completion(messages, stream=True, **settings)  # type: ignore[arg-type]
    for chunk in chunks:
        choice = chunk["choices"][0]
        yield choice["delta"].get("content") or "", choice["finish_reason"]


def text_pieces(llm: Llama, prompt: str, **settings: Any) -> Iterator[Piece]:
    """Continue a text; `settings` are those of `create_completion`."""
    chunks: Any = llm.create_completion(prompt, stream=True, **settings)
    for chunk in chunks:
        choice = chunk["choices"][0]
        yield choice["text"], choice["finish_reason"]
