"""Tiny GGUF models with random f32 weights, one for each kind of position encoding and attention the cache meets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, RopeScalingType

N_EMBD = 96
N_HEAD = 3
N_HEAD_KV = 1
N_EMBD_HEAD = 32
N_FF = 64
N_VOCAB = 61
N_LAYER = 4
N_CTX = 1024
SINK_TOKEN = 7
"""Of "llama-sinks": its value is zero in the first layer, as attention sinks have it."""

Shapes = dict[str, tuple[int, ...]]

ATTENTION: Shapes = {
    "attn_q.weight": (N_HEAD * N_EMBD_HEAD, N_EMBD),
    "attn_k.weight": (N_HEAD_KV * N_EMBD_HEAD, N_EMBD),
    "attn_v.weight": (N_HEAD_KV * N_EMBD_HEAD, N_EMBD),
    "attn_output.weight": (N_EMBD, N_HEAD * N_EMBD_HEAD),
}
GATED_FFN: Shapes = {
    "ffn_gate.weight": (N_FF, N_EMBD),
    "ffn_up.weight": (N_FF, N_EMBD),
    "ffn_down.weight": (N_EMBD, N_FF),
}
NORMS: Shapes = {"attn_norm.weight": (N_EMBD,), "ffn_norm.weight": (N_EMBD,)}
QKV_BIAS: Shapes = {
    "attn_q.bias": (N_HEAD * N_EMBD_HEAD,),
    "attn_k.bias": (N_HEAD_KV * N_EMBD_HEAD,),
    "attn_v.bias": (N_HEAD_KV * N_EMBD_HEAD,),
}
QK_NORM: Shapes = {"attn_q_norm.weight": (N_EMBD_HEAD,), "attn_k_norm.weight": (N_EMBD_HEAD,)}
GPT2: Shapes = {
    "attn_norm.weight": (N_EMBD,),
    "attn_norm.bias": (N_EMBD,),
    "attn_qkv.weight": (3 * N_EMBD, N_EMBD),
    "attn_qkv.bias": (3 * N_EMBD,),
    "attn_output.weight": (N_EMBD, N_EMBD),
    "attn_output.bias": (N_EMBD,),
    "ffn_norm.weight": (N_EMBD,),
    "ffn_norm.bias": (N_EMBD,),
    "ffn_up.weight": (N_FF, N_EMBD),
    "ffn_up.bias": (N_FF,),
    "ffn_down.weight": (N_EMBD, N_FF),
    "ffn_down.bias": (N_EMBD,),
}


def _llama(_: GGUFWriter) -> tuple[Shapes, Shapes]:
    return NORMS | ATTENTION | GATED_FFN, {}


def _llama_heads_of(n: int, writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    writer.add_key_length(n)
    writer.add_value_length(n)
    writer.add_rope_dimension_count(n)
    attention: Shapes = {
        "attn_q.weight": (N_HEAD * n, N_EMBD),
        "attn_k.weight": (N_HEAD_KV * n, N_EMBD),
        "attn_v.weight": (N_HEAD_KV * n, N_EMBD),
        "attn_output.weight": (N_EMBD, N_HEAD * n),
    }
    return NORMS | attention | GATED_FFN, {}


def _llama3_factors(_: GGUFWriter) -> tuple[Shapes, Shapes]:
    return NORMS | ATTENTION | GATED_FFN, {"rope_freqs.weight": (N_EMBD_HEAD // 2,)}


def _yarn(writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(N_CTX // 4)
    return NORMS | ATTENTION | GATED_FFN, {}


def _qwen2(_: GGUFWriter) -> tuple[Shapes, Shapes]:
    return NORMS | ATTENTION | QKV_BIAS | GATED_FFN, {}


def _qwen3(_: GGUFWriter) -> tuple[Shapes, Shapes]:
    return NORMS | ATTENTION | QK_NORM | GATED_FFN, {}


def _stablelm(writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD_HEAD // 2)
    writer.add_parallel_residual(False)
    bias = {"attn_norm.bias": (N_EMBD,), "ffn_norm.bias": (N_EMBD,)}
    return NORMS | bias | ATTENTION | GATED_FFN, {"output_norm.bias": (N_EMBD,)}


def _gpt2(writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    writer.add_layer_norm_eps(1e-5)
    return GPT2, {"position_embd.weight": (N_CTX, N_EMBD), "output_norm.bias": (N_EMBD,)}


# where it is not N_EMBD_HEAD
HEAD_SIZES = {"llama-heads-of-20": 20, "llama-heads-of-288": 288}

# name: architecture, shapes of one layer and of the model, KV heads
MODELS: dict[str, tuple[str, Callable[[GGUFWriter], tuple[Shapes, Shapes]], int]] = {
    "llama": ("llama", _llama, N_HEAD_KV),
    "llama-heads-of-20": ("llama", partial(_llama_heads_of, 20), N_HEAD_KV),
    "llama-heads-of-288": ("llama", partial(_llama_heads_of, 288), N_HEAD_KV),
    "llama-sinks": ("llama", _llama, N_HEAD_KV),
    "llama3-factors": ("llama", _llama3_factors, N_HEAD_KV),
    "llama-yarn": ("llama", _yarn, N_HEAD_KV),
    "qwen2": ("qwen2", _qwen2, N_HEAD_KV),
    "qwen3": ("qwen3", _qwen3, N_HEAD_KV),
    "stablelm": ("stablelm", _stablelm, N_HEAD_KV),
    "gpt2": ("gpt2", _gpt2, N_HEAD),
}


def write_model(name: str, path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write the model called `name`; returns its tensors by name, arrays of f32."""
    arch, build, n_head_kv = MODELS[name]
    writer = GGUFWriter(path, arch)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    layer, model = build(writer)
    shapes: Shapes = {
        "token_embd.weight": (N_VOCAB, N_EMBD),
        "output_norm.weight": (N_EMBD,),
        "output.weight": (N_VOCAB, N_EMBD),
        **model,
        **{f"blk.{il}.{key}": shape for il in range(N_LAYER) for key, shape in layer.items()},
    }
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for key, shape in shapes.items():
        if key == "rope_freqs.weight":
            value = np.linspace(1.0, 4.0, shape[0])
        elif key.endswith("norm.weight"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            # queries and keys large enough that attention is far from uniform
            value = rng.normal(0, 0.3 if ("attn_q." in key or "attn_k." in key) else 0.15, shape)
        if name == "llama-sinks" and key == "blk.0.attn_v.weight":
            x = tensors["token_embd.weight"][SINK_TOKEN] * tensors["blk.0.attn_norm.weight"]
            value -= np.outer(value @ x, x) / (x @ x)
        tensors[key] = value.astype(np.float32)
        writer.add_tensor(key, tensors[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
