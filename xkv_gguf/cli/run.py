"""``xkv-gguf run``: one prompt, one answer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..base.files import check_writable, read_text
from ..base.text import clean_text
from ..errors import OptionError
from ._answer import Answer, add_model_arguments, answer_chat, answer_text, open_llama, sampling, write
from ._saved import PromptCache

DEFAULT_MAX_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="prompt; with -f, what follows the file's text")
    prompt.add_argument("-f", "--file", metavar="FILE", help="text file with the prompt, - for standard input")
    style = prompt.add_mutually_exclusive_group()
    style.add_argument("--chat", action="store_true", help="put the prompt into the model's chat format (default)")
    style.add_argument("--raw", action="store_true", help="continue the prompt as it stands")
    parser.add_argument(
        "-n",
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="longest answer in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="take what the prompt begins with from this state, if there is one, and write the read prompt's there",
    )
    parser.add_argument("--stats", action="store_true", help="show speed and the cache's memory, on standard error")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    add_model_arguments(parser, temp=0.0)


def run(args: argparse.Namespace) -> int:
    """Print the answer; 0 when there is one."""
    if args.max_tokens < 1:
        raise OptionError(f"-n: {args.max_tokens}, expected 1 or more")
    prompt = _prompt(args)
    if args.prompt_cache is not None:
        check_writable(Path(args.prompt_cache))
    llm = open_llama(args)
    try:
        saved = None if args.prompt_cache is None else PromptCache(llm, Path(args.prompt_cache))
        then = saved.write if saved else None
        settings = sampling(args, args.max_tokens)
        show = (lambda text: None) if args.json else write
        if args.raw:
            answer = answer_text(llm, prompt, settings, show, then)
        else:
            answer = answer_chat(llm, [{"role": "user", "content": prompt}], settings, show, then)
        n_cached = saved.n_cached if saved else 0
        if args.json:
            print(_to_json(answer, llm.kv_report().to_dict(), n_cached))
        else:
            print()
        sys.stdout.flush()  # before the figures, where both go the same way
        if args.stats and saved:
            print(f"{n_cached} of {answer.n_prompt} tokens of the prompt came from {saved.path}", file=sys.stderr)
        if args.stats:
            print(answer, llm.kv_report(), sep="\n", file=sys.stderr)
    finally:
        llm.close()
    if answer.finish_reason == "interrupt":
        raise KeyboardInterrupt
    return 0


def _prompt(args: argparse.Namespace) -> str:
    parts = []
    if args.file is not None:
        parts.append(read_text(args.file).rstrip("\n"))
    if args.prompt is not None:
        parts.append(clean_text(args.prompt))
    if not parts:
        raise OptionError("no prompt: give -p TEXT or -f FILE")
    text = "\n\n".join(parts)
    if not text.strip():
        raise OptionError("the prompt is empty")
    return text


def _to_json(answer: Answer, cache: dict[str, object], n_cached: int) -> str:
    return json.dumps(
        {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.n_prompt,
            "cached_tokens": n_cached,
            "generated_tokens": answer.n_generated,
            "first_token_s": round(answer.first_s, 4),
            "decode_tps": round(answer.decode_tps, 2),
            "cache": cache,
        },
        ensure_ascii=False,
    )
