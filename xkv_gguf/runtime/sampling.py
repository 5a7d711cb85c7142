"""What llama_cpp hands to llama.cpp's samplers, checked where it would follow a null pointer."""

from __future__ import annotations

from typing import Any

from ..errors import OptionError
from .api import llama_cpp


def check_grammar(vocab: Any, grammar: Any) -> None:
    """Parse a grammar.

    Parameters
    ----------
    vocab : pointer
        The llama_vocab.
    grammar : llama_cpp.LlamaGrammar

    Raises
    ------
    OptionError
        It does not parse, or has no rule of its root's name; llama.cpp prints where.
    """
    text, root = grammar._grammar, grammar._root
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode("utf-8"), root.encode("utf-8"))
    if not sampler:
        short = text if len(text) <= 60 else text[:60] + "..."
        raise OptionError(f"grammar {short!r} does not parse, expected GBNF with a rule {root!r}; see standard error")
    llama_cpp.llama_sampler_free(sampler)
