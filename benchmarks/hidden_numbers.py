"""Seven-digit numbers hidden in natural prose, and how many of them each cache finds.

    python benchmarks/hidden_numbers.py MODEL.gguf NOVEL.txt --caches f16,xkv:7 --json numbers.json

Documents of `--length` tokens are cut from the text, each with one number in it, at depths spread evenly. The answer
begins with the words in which the number was hidden, and is decoded greedily.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xkv_gguf import Llama
from xkv_gguf.base.files import write_atomic
from xkv_gguf.lab.cache_spec import parse_caches

KEYS = ("harbour", "lantern", "orchard", "chapel", "mill", "bakery", "quarry", "ferry")
SENTENCE = "The special magic number for the {key} is {number}."


def document(llm: Llama, words: list[str], length: int, depth: float, key: str, number: str) -> str:
    """About `length` tokens of the text, from somewhere in it, with the number at a depth."""
    n_word = length * 7 // 10
    while len(llm.tokenize(" ".join(words[:n_word]).encode())) > length:
        n_word -= 20
    start = int(number) % (len(words) - n_word)
    part = words[start : start + n_word]
    part.insert(int(depth * n_word), SENTENCE.format(key=key, number=number))
    return " ".join(part)


def ask(llm: Llama, text: str, key: str) -> str:
    """What the model says of a key."""
    prompt = (
        f"<|im_start|>user\nA special magic number is hidden in this text. Memorize it.\n\n{text}\n\n"
        f"What is the special magic number for the {key}?<|im_end|>\n"
        f"<|im_start|>assistant\nThe special magic number for the {key} is"
    )
    answer: Any = llm.create_completion(prompt, max_tokens=12, temperature=0.0)
    return str(answer["choices"][0]["text"])


def main() -> None:
    """Ask, print and write the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--caches", default="f16,xkv:7")
    parser.add_argument("--numbers", type=int, default=20)
    parser.add_argument("--length", type=int, default=4800)
    parser.add_argument("--n-ctx", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    words = args.text.read_text(encoding="utf-8").split()
    rows = []
    for spec in parse_caches(args.caches):
        llm = Llama(str(args.model), n_ctx=args.n_ctx, n_threads=args.threads, verbose=False, **spec.arguments)
        rng = random.Random(0)
        answers: list[dict[str, Any]] = []
        for i in tqdm(range(args.numbers), desc=spec.name, unit="document"):
            key, number = KEYS[i % len(KEYS)], str(rng.randrange(10**6, 10**7))
            said = ask(llm, document(llm, words, args.length, (i + 0.5) / args.numbers, key, number), key)
            answers.append({"number": number, "said": said, "found": number in said.replace(",", "")})
        found = sum(answer["found"] for answer in answers)
        print(f"{spec.name}: {found} of {len(answers)}")
        rows.append({"cache": spec.name, "found": found, "n": len(answers), "answers": answers})
        llm.close()
    result = {"command": " ".join(["python", *sys.argv]), "length": args.length, "rows": rows}
    write_atomic(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
