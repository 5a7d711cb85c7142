"""What `run` and `chat` share: options of the model, and answers as they are generated."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..options import KV_MODES
from ._args import (
    OPTIONS,
    add_adaptation,
    add_devices,
    add_memory_size,
    add_model,
    add_sidecar,
    add_threads,
    check_counts,
    device_settings,
    model_path,
    thread_settings,
    xkv_values,
)
from ._reading import reading
from ._stream import Piece, chat_pieces, text_pieces

if TYPE_CHECKING:
    from ..llama import Llama

DEFAULT_N_CTX = 8192
TOO_LONG = re.compile(r"Requested tokens \((\d+)\) exceed context window of (\d+)")


@dataclass(frozen=True)
class Answer:
    """A generated text with its figures.

    Attributes
    ----------
    text : str
    n_prompt, n_generated : int
        Tokens of the prompt and of the answer, the one that ends it included.
    finish_reason : str
        "stop", "length", or "interrupt" after Ctrl-C.
    first_s, rest_s : float
        Seconds up to the first token (the prompt) and for the others.
    """

    text: str
    n_prompt: int
    n_generated: int
    finish_reason: str
    first_s: float
    rest_s: float

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first one; 0 when there is none."""
        return (self.n_generated - 1) / self.rest_s if self.n_generated > 1 and self.rest_s > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"prompt {self.n_prompt} tokens, first token after {self.first_s:.2f} s; "
            f"{self.n_generated} tokens generated, {self.decode_tps:.1f} tokens/s"
        )


def add_model_arguments(parser: argparse.ArgumentParser, temp: float) -> None:
    """Add MODEL and the options of cache, context and sampling."""
    add_model(parser)
    cache = parser.add_argument_group("cache")
    cache.add_argument("--kv-mode", default="xkv", metavar="MODE", help=f"{', '.join(KV_MODES)} (default: xkv)")
    add_sidecar(cache, "xkv")
    add_adaptation(cache, "prompt")
    cache.add_argument(
        "--n-ctx",
        type=int,
        metavar="N",
        help=f"context in tokens, 0 for the model's own (default: {DEFAULT_N_CTX}, at most the model's own)",
    )
    add_memory_size(parser, "none of them takes what the sidecar was made for")
    model = parser.add_argument_group("generation")
    add_threads(model)
    add_devices(model)
    model.add_argument(
        "--temp", type=float, default=temp, metavar="T", help="temperature, 0 is greedy (default: %(default)s)"
    )
    model.add_argument("--seed", type=int, metavar="N", help="seed of sampling (default: random)")
    parser.add_argument("--verbose", action="store_true", help="show llama.cpp's log")


def open_llama(args: argparse.Namespace) -> Llama:
    """Load the model that the arguments name.

    Raises
    ------
    XkvError
        See `xkv_gguf.Llama`.
    """
    from ..model.file import open_model
    from ..options import check_kv_mode

    check_kv_mode(args.kv_mode)
    xkv = xkv_values(args)
    if xkv and args.kv_mode != "xkv":
        raise OptionError(f"{OPTIONS[next(iter(xkv))]} is for --kv-mode xkv, not {args.kv_mode}")
    check_counts(args, "threads")
    if not args.temp >= 0:
        raise OptionError(f"--temp: {args.temp}, expected 0 or more")
    path = model_path(args)
    n_ctx = args.n_ctx
    if n_ctx is None:
        n_ctx = min(DEFAULT_N_CTX, open_model(path).n_ctx_train or DEFAULT_N_CTX)

    from .. import Llama
    from ..runtime import log

    if not args.verbose:
        log.silence()
    settings = {"n_ctx": n_ctx, "verbose": args.verbose, **thread_settings(args.threads), **device_settings(args)}
    return Llama(path, kv_mode=args.kv_mode, xkv=xkv or None, **settings)


def sampling(args: argparse.Namespace, max_tokens: int | None) -> dict[str, Any]:
    """Arguments of a completion."""
    seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(4), "little")
    return {"max_tokens": max_tokens, "temperature": args.temp, "seed": seed}


def answer_chat(
    llm: Llama,
    messages: list[dict[str, str]],
    settings: dict[str, Any],
    show: Callable[[str], None],
    then: Callable[[], None] | None = None,
) -> Answer:
    """Answer a conversation; `show` gets the text as it comes, `then` is called when the prompt was read.

    Raises as `answer_text`.
    """
    return _collect(llm, chat_pieces(llm, messages, **settings), show, then)


def answer_text(
    llm: Llama,
    prompt: str,
    settings: dict[str, Any],
    show: Callable[[str], None],
    then: Callable[[], None] | None = None,
) -> Answer:
    """Continue a text; `show` gets the continuation as it comes, `then` is called when the prompt was read.

    Raises
    ------
    OptionError
        The prompt does not fit into the context.
    """
    return _collect(llm, text_pieces(llm, prompt, **settings), show, then)


def _collect(
    llm: Llama, pieces: Iterator[Piece], show: Callable[[str], None], then: Callable[[], None] | None
) -> Answer:
    text: list[str] = []
    finish_reason = "stop"
    start = first = time.perf_counter()
    try:
        with reading(llm, then):
            for piece, reason in pieces:
                if piece and not text:
                    first = time.perf_counter()
                if piece:
                    text.append(piece)
                    show(piece)
                finish_reason = reason or finish_reason
    except KeyboardInterrupt:
        finish_reason = "interrupt"
    except ValueError as error:
        found = TOO_LONG.search(str(error))
        if found is None:
            raise
        raise OptionError(
            f"the prompt takes {found[1]} tokens, n_ctx is {found[2]}: shorten it or give a larger --n-ctx"
        ) from error
    end = time.perf_counter()
    if not text:
        first = end
    n_prompt = llm.n_prompt_tokens
    # the last token is sampled, not evaluated
    n_generated = max(0, llm.n_tokens - n_prompt + 1)
    return Answer("".join(text), n_prompt, n_generated, finish_reason, first - start, end - first)


def write(text: str) -> None:
    """Print a piece of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
