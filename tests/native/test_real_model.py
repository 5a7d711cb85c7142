"""The full-rank invariant on SmolLM2 with its weights in f32.

The demo model's own weights make llama.cpp round activations to 8 bits, so that two correct attentions differ by half a
logit; in f32 they differ by rounding only. Run with -s and --full-rank-tokens 4096 for the table in
docs/architecture.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

from xkv_gguf.lab.haystack import paragraphs

from .harness import Context, close_model, lib, open_context, open_model
from .sidecars import write_random

pytestmark = [pytest.mark.model, pytest.mark.slow]

N_LAYER = 30
N_EMBD_KV = 192
N_GREEDY = 200


def write_f32(source: Path, target: Path) -> None:
    """Copy a GGUF model with every tensor as f32."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for key, value in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = value.types[0]
        sub_type = value.types[1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value.contents(), kind, sub_type=sub_type)
    for tensor in reader.tensors:
        data = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, data.reshape(tensor.shape[::-1].tolist()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("f32") / "smollm2-f32.gguf"
    write_f32(demo_model, path)
    opened = open_model(path)
    path.unlink()  # stays mapped
    yield opened
    close_model(opened)


def tokenize(model: Any, n_tokens: int) -> list[int]:
    """Tokens of a made-up story."""
    story = paragraphs(seed=5)
    tokens: list[int] = []
    while len(tokens) < n_tokens:
        text = (next(story) + "\n\n").encode()
        buffer = (lib.llama_token * len(text))()
        count = lib.llama_tokenize(lib.llama_model_get_vocab(model), text, len(text), buffer, len(text), False, False)
        tokens += buffer[:count]
    return tokens[:n_tokens]


def run(ctx: Context, prompt: list[int], greedy: list[int] | None) -> dict[str, Any]:
    """Prompt, 200 greedy tokens (or the given ones), then batches of 4 and of 64 tokens."""
    logits = {"prompt": ctx.feed(prompt, 512, last_only=True)[-1:]}
    steps, tokens = [logits["prompt"][-1]], []
    for i in range(N_GREEDY):
        tokens.append(int(steps[-1].argmax()))
        steps.append(ctx.decode((0, [greedy[i] if greedy else tokens[-1]]))[-1])
    logits["decode"] = np.stack(steps[1:])
    logits["4 queries"] = ctx.decode((0, prompt[:4]))
    logits["64 queries"] = ctx.decode((0, prompt[:64]))
    return {"logits": logits, "greedy": tokens}


def test_equals_plain_cache(model: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    n_prompt = request.config.getoption("--full-rank-tokens")
    prompt = tokenize(model, n_prompt)
    params = write_random(tmp_path / "s.xkv.gguf", N_LAYER, (N_EMBD_KV, N_EMBD_KV), 5, 64).params()
    shape = {"n_ctx": -(-(n_prompt + 512) // 256) * 256, "n_ubatch": 512, "n_threads": 2}
    with open_context(model, flash_attn=False, **shape) as ctx:
        exact = run(ctx, prompt, None)
    found = {}
    for name, kind in {"f16": {"exact": False}, "xkv": {"xkv": params}}.items():
        with open_context(model, **shape, **kind) as ctx:
            found[name] = run(ctx, prompt, exact["greedy"])
    difference = {
        name: {part: float(np.abs(logits - exact["logits"][part]).max()) for part, logits in one["logits"].items()}
        for name, one in found.items()
    }
    for name, parts in difference.items():
        print(name, *(f"{part} {value:.4f}" for part, value in parts.items()), sep=" | ", file=sys.stderr)
    assert found["xkv"]["greedy"] == exact["greedy"]
    for part, value in difference["xkv"].items():
        # where few queries go through flash attention, its own rounding is larger
        assert value <= max(1e-2, 2 * difference["f16"][part]), part
