"""``python -m xkv_gguf.demo``: a small model finds a fact in a long document, on an xkv cache."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .base.text import format_bytes, format_table
from .cli._reading import reading
from .cli._stream import chat_pieces
from .errors import XkvError
from .lab.haystack import Haystack, build_haystack, make_needle
from .model.demo_model import demo_model
from .report import KvReport

if TYPE_CHECKING:
    from .llama import Llama

N_CTX = 8192
N_DOCUMENT = 6000
DEPTH = 0.4
NEEDLE_SEED = 3
TEXT_SEED = 1
MAX_ANSWER = 48
OTHER_MODES = ("f16", "q8_0", "q4_0")


def document(llm: Llama) -> Haystack:
    """About 6000 tokens of made-up village life with one fact in it."""

    def count(text: str) -> int:
        return len(llm.tokenize(text.encode(), add_bos=False))

    return build_haystack(count, N_DOCUMENT, [make_needle(NEEDLE_SEED)], [DEPTH], TEXT_SEED)


def ask(llm: Llama, haystack: Haystack) -> str:
    """Stream the answer to the terminal and return it."""
    text = ""
    messages = [{"role": "user", "content": haystack.prompt()}]
    with reading(llm):
        for piece, _ in chat_pieces(llm, messages, temperature=0.0, max_tokens=MAX_ANSWER):
            text += piece
            print(piece, end="", flush=True)
    print()
    return text


def size_table(reports: list[KvReport]) -> str:
    """Bytes of each cache, and how many times smaller than the first one it is."""
    full = reports[0].total_bytes
    rows = [["cache", "bytes", "", "times smaller"]]
    for report in reports:
        size = report.total_bytes
        rows.append([report.kv_mode, f"{size:,}", format_bytes(size), f"{full / size:.2f}"])
    return "\n".join(format_table(rows, "<>>>"))


def main() -> int:
    """Run the demo; 0 when the answer holds the fact, 1 when not."""
    from . import Llama
    from .runtime import log

    log.silence()
    model = demo_model()
    reports = [report_of(model, mode) for mode in OTHER_MODES]
    llm = Llama(model, kv_mode="xkv", n_ctx=N_CTX, verbose=False)
    haystack = document(llm)
    needle = haystack.needles[0]
    print(f"{model.name} reads a document of {haystack.n_tokens} tokens on an xkv cache (n_ctx {N_CTX}).")
    print(f"Hidden {DEPTH:.0%} into it: {needle.sentence}")
    print(f"\n> {needle.question}")
    start = time.perf_counter()
    answer = ask(llm, haystack)
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} s\n\n{llm.kv_report()}\n")
    print(size_table([*reports, llm.kv_report()]))
    llm.close()
    if not needle.found_in(answer):
        print(f"\nThe answer lacks {needle.answer}.", file=sys.stderr)
        return 1
    return 0


def report_of(model: Path, kv_mode: str) -> KvReport:
    """Memory of another cache for the same context, from a real one."""
    from . import Llama

    llm = Llama(model, kv_mode=kv_mode, n_ctx=N_CTX, verbose=False)
    try:
        return llm.kv_report()
    finally:
        llm.close()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except XkvError as error:
        sys.exit(f"xkv-gguf demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
