"""Writes docs/models.md from the table that the tests hold every architecture to.

python docs/scripts/models_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.archs.table import ARCHS, HELD, HYBRID, LATENTS, PLAIN, WINDOWED  # noqa: E402
from tests.archs.test_verbs import FAMILIES  # noqa: E402

OUT = ROOT / "docs" / "models.md"

SHAPES = (
    ("Llama-3.1-8B", "llama", 32, 32, 2048, ""),
    ("Qwen3-8B", "qwen3", 36, 36, 2048, ""),
    ("Qwen3.5-27B", "qwen35", 64, 16, 2048, "recurrent state"),
    ("Gemma-3-27B", "gemma3", 62, 10, 4096, "52 layers with a window of 1024"),
    ("Gemma-2-9B", "gemma2", 42, 21, 4096, "21 layers with a window of 4096"),
    ("gpt-oss-20b", "gpt-oss", 24, 12, 1024, "12 layers with a window of 128"),
    ("DeepSeek-V3", "deepseek2", 61, 61, 576, ""),
    ("Kimi-Linear-48B", "kimi-linear", 27, 7, 576, "recurrent state"),
)
"""Published shapes: architecture, layers, layers that keep all tokens, numbers of K and V of one, what stays beside."""

HEAD = """# Models

An xkv cache holds the layers that keep K and V of all tokens. What else a model remembers stays llama.cpp's own and is
exact: layers with a sliding window (f16), and recurrent state. `kv_report()` and `--stats` show these as lines of their
own; ratios are of the layers that the cache holds. Which layers those are is asked of llama.cpp, by the filters that it
makes its own cache with, before any weight is loaded; a model that cannot be done right is refused there by name.

Attention with sink logits (gpt-oss) and capped scores (Gemma 2) is done in both paths. V of models with sinks is stored
without taking off its mean, since the weights of their values do not sum to one. Layers that attend to another layer's
K and V (Gemma 3n, Gemma 4) share what is stored of it. M-RoPE is one rotation, as all positions of a text token are the
same; a batch of embeddings with positions of their own, as of an image, is refused. Layers for multi-token prediction
are left out of the cache. An architecture that is not in the list below loads with a warning that names it.

Of latents (MLA: DeepSeek V2 and V3, Kimi, Mistral 4), llama.cpp keeps K alone, whose first numbers are V. A group's
coefficients serve both, so that nothing is stored of V. Attention over them is made of stock ops on every device, which
take all directions of all tokens: more work than the op XKV_ATTN does elsewhere. They have run on the CPU only.

## Bytes per token, computed

From published shapes, for the layers that grow with the context; f16, and xkv at a ratio of 7.

"""


def lines() -> list[str]:
    """The tables."""
    found = ["| model | architecture | layers held | stays as it is | f16 | xkv, 7x |", "|---|---|---|---|---|---|"]
    for name, arch, n_layer, n_held, n_embd, beside in SHAPES:
        plain = 2 * n_embd * n_held
        held = f"{n_held} of {n_layer}" if n_held < n_layer else f"all {n_layer}"
        found.append(
            f"| {name} | {arch} | {held} | {beside or '-'} | {plain / 1024:.3g} KiB | {plain / 7 / 1024:.1f} KiB |"
        )
    found += [
        "",
        "## Architectures",
        "",
        "What the tests do with a tiny random model of every architecture that upstream's own test can make. All that",
        "are held equal the plain cache at full rank, in prompts, single tokens and batches between. Those in bold are",
        "converted, run, chatted with and evaluated as well.",
        "",
    ]
    for kind, text in (
        (PLAIN, "Held whole"),
        (WINDOWED, "Full-attention layers held, windowed layers as they are"),
        (HYBRID, "Attention layers held, recurrent state as it is"),
    ):
        names = [f"**{name}**" if name in FAMILIES else name for name in HELD if ARCHS[name] == kind]
        found += [f"**{text}** ({len(names)}): {', '.join(names)}.", ""]
    found += [f"Of these, with latents ({len(LATENTS)}): {', '.join(LATENTS)}.", ""]
    found += ["**Refused**, with the reason:", "", "| reason | architectures |", "|---|---|"]
    for why in sorted({why for name, why in ARCHS.items() if name not in HELD}):
        found.append(f"| {why} | {', '.join(name for name, reason in ARCHS.items() if reason == why)} |")
    found += [
        "",
        "A name ending in `-moe` is the architecture with experts. No weights of these families were run but those of "
        "SmolLM2 (llama).",
    ]
    return found


def document() -> str:
    """The whole file."""
    return HEAD + "\n".join(lines()) + "\n"


if __name__ == "__main__":
    OUT.write_text(document(), encoding="utf-8")
