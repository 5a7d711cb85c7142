"""How probable a needle's number is on each cache, where RULER only says whether the answer was right.

After a sample's prompt the model is given the number, token by token. Printed are the log-probability of the whole
number (nats), and the probability of its first digit beside that of the most probable wrong token: where f16 has the
two close together, its answer is decided by rounding.

    python docs/scripts/needle_margin.py MODEL.gguf --length 8192 --samples 8 --caches f16,xkv:7
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from xkv_gguf import Llama
from xkv_gguf.lab.cache_spec import parse_caches
from xkv_gguf.lab.ruler.prompt import Prompter
from xkv_gguf.lab.ruler.task import Sample, fit
from xkv_gguf.lab.ruler.tasks import parse_tasks
from xkv_gguf.runtime.api import llama_cpp


def log_probabilities(llm: Any) -> np.ndarray:
    """Of the next token, n_vocab numbers."""
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def margin(llm: Any, prompter: Prompter, sample: Sample) -> str:
    """One line of figures."""
    number = sample.turns[0].references[0]
    llm.reset()
    llm.eval(prompter.first(sample))
    total, first = 0.0, ""
    tokens = llm.tokenize(f" {number}".encode(), add_bos=False)
    pieces = [llm.detokenize([token]) for token in tokens]
    if pieces[:2] != [b" ", number[0].encode()]:
        raise SystemExit(f"{llm.model_path}: the tokens of {number} are {pieces}, expected a space and single digits")
    for i, token in enumerate(tokens):
        p = log_probabilities(llm)
        total += p[token]
        if i == 1:  # after the space
            wrong = int(np.where(np.arange(len(p)) == token, -np.inf, p).argmax())
            other = llm.detokenize([wrong]).decode(errors="replace")
            first = f"{number[0]!r} {np.exp(p[token]):.2f} | {other!r} {np.exp(p[wrong]):.2f}"
        llm.eval([token])
    return f"{total:.2f} | {first}"


def main() -> None:
    """Print one line per cache and sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--caches", default="f16,xkv:7")
    parser.add_argument("--task", default="niah_single_2", help="one whose answer is a number")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()

    (task,) = parse_tasks(args.task)
    print("cache | sample | depth | number, nats | first digit | best other")
    for spec in parse_caches(args.caches):
        arguments: dict[str, Any] = spec.arguments
        llm = Llama(args.model, n_ctx=args.length, verbose=False, **arguments)
        prompter = Prompter(llm)
        for index in range(args.samples):
            sample = fit(task, args.length, 0, index, prompter.cost)
            depth = sample.document.index(sample.turns[0].references[0]) / len(sample.document)
            print(f"{spec.name} | {index} | {depth:.2f} | {margin(llm, prompter, sample)}", flush=True)
        llm.close()


if __name__ == "__main__":
    main()
