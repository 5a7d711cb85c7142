"""Tiny GGUF models with random weights, for architectures that no test model has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

N_EMBD = 64
N_HEAD = 2
N_FF = 64
N_VOCAB = 32
N_LAYER = 2


def write_alibi_model(path: Path, n_head: int = N_HEAD) -> None:
    """A refact model: scores have a bias by distance, which no xkv cache has. Heads have 64 / `n_head` numbers."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "refact")
    writer.add_context_length(1024)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(N_EMBD // n_head)
    writer.add_value_length(N_EMBD // n_head)
    _add_vocabulary(writer)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (N_VOCAB, N_EMBD), "output_norm": (N_EMBD,)}
    for layer in range(N_LAYER):
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{layer}.{name}"] = (N_EMBD,)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}"] = (N_EMBD, N_EMBD)
        for name in ("ffn_gate", "ffn_up"):
            shapes[f"blk.{layer}.{name}"] = (N_FF, N_EMBD)
        shapes[f"blk.{layer}.ffn_down"] = (N_EMBD, N_FF)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.1, shape).astype(np.float32))
    _finish(writer)


def write_unknown_model(path: Path) -> None:
    """A sound GGUF file of an architecture that does not exist."""
    writer = GGUFWriter(path, "nosuch")
    writer.add_context_length(1024)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    _finish(writer)


def write_adapter(path: Path, architecture: str, n_embd: int, n_in: int | None = None) -> None:
    """A LoRA adapter that changes the output projection of the first layer a lot."""
    rng = np.random.default_rng(1)
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for side, shape in (("a", (4, n_in or n_embd)), ("b", (n_embd, 4))):
        writer.add_tensor(f"blk.0.attn_output.weight.lora_{side}", rng.normal(0, 1, shape).astype(np.float32))
    _finish(writer)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: GGUFWriter) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(N_VOCAB - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * (N_VOCAB - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
