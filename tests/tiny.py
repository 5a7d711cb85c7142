"""A tiny llama model with random weights and a byte tokenizer, and its first layer computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter

N_LAYER = 3
N_EMBD = 64
N_HEAD = 4
N_HEAD_KV = 2
HEAD = 32
N_FF = 96
N_VOCAB = 3 + 256
EPS = 1e-5
ROPE_BASE = 10000.0
EMBD_KV = N_HEAD_KV * HEAD

Array = npt.NDArray[Any]


def weights(seed: int) -> dict[str, Array]:
    """Tensors by name, without the suffix ".weight"."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    tensors = {"token_embd": normal(N_VOCAB, N_EMBD), "output_norm": np.ones(N_EMBD, np.float32)}
    for i in range(N_LAYER):
        tensors[f"blk.{i}.attn_norm"] = 1 + normal(N_EMBD)
        tensors[f"blk.{i}.attn_q"] = normal(N_HEAD * HEAD, N_EMBD)
        tensors[f"blk.{i}.attn_k"] = normal(EMBD_KV, N_EMBD)
        tensors[f"blk.{i}.attn_v"] = normal(EMBD_KV, N_EMBD)
        tensors[f"blk.{i}.attn_output"] = normal(N_EMBD, N_HEAD * HEAD)
        tensors[f"blk.{i}.ffn_norm"] = 1 + normal(N_EMBD)
        tensors[f"blk.{i}.ffn_gate"] = normal(N_FF, N_EMBD)
        tensors[f"blk.{i}.ffn_up"] = normal(N_FF, N_EMBD)
        tensors[f"blk.{i}.ffn_down"] = normal(N_EMBD, N_FF)
    return tensors


def add_byte_tokenizer(writer: GGUFWriter) -> None:
    """Tokens for bytes, and three others."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def write_tiny(path: Path, tensors: dict[str, Array]) -> None:
    """Write the model as a GGUF file."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(2048)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPS)
    add_byte_tokenizer(writer)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def first_layer(tensors: dict[str, Array], tokens: list[int], offsets: Array) -> tuple[Array, Array]:
    """K and V of layer 0 in float64: K rotated by `offsets` instead of by the tokens' positions."""
    x = tensors["token_embd"][tokens].astype(np.float64)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + EPS) * tensors["blk.0.attn_norm"]
    k = (x @ tensors["blk.0.attn_k"].T).reshape(len(tokens), N_HEAD_KV, HEAD // 2, 2)
    v = x @ tensors["blk.0.attn_v"].T
    angle = offsets[:, None] * ROPE_BASE ** (-np.arange(HEAD // 2) / (HEAD // 2))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    rotated = np.stack([k[..., 0] * cos - k[..., 1] * sin, k[..., 0] * sin + k[..., 1] * cos], axis=-1)
    return rotated.reshape(len(tokens), EMBD_KV), v
