"""Tiny GGUF models with random f32 weights, one for each kind of position encoding and attention the cache meets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from tests.tiny import N_VOCAB as BYTE_VOCAB
from tests.tiny import add_byte_tokenizer

N_EMBD = 96
N_HEAD = 3
N_HEAD_KV = 1
N_EMBD_HEAD = 32
N_FF = 64
N_VOCAB = 61
N_LAYER = 4
N_CTX = 1024
N_ROT = 32
"""Of "minicpm3" and "plm": the numbers at the end of a key's head that RoPE turns."""
N_LORA = 48
"""Of "minicpm3" and "plm": the latent vectors that heads are made from."""
N_LATENT = 64
"""Of "deepseek2": the latent vectors that a cache holds, each with N_ROT numbers that RoPE turns."""
SINK_TOKEN = 7
"""Of "llama-sinks": its value is zero in the first layer, as attention sinks have it."""

LARGE = ("attn_q.", "attn_q_b.", "attn_k.", "attn_k_b.")
"""Parts of names: queries and keys large enough that attention is far from uniform."""

Shapes = dict[str, tuple[int, ...]]

GATED_FFN: Shapes = {
    "ffn_gate.weight": (N_FF, N_EMBD),
    "ffn_up.weight": (N_FF, N_EMBD),
    "ffn_down.weight": (N_EMBD, N_FF),
}
UNGATED_FFN: Shapes = {"ffn_up.weight": (N_FF, N_EMBD), "ffn_down.weight": (N_EMBD, N_FF)}
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


@dataclass(frozen=True)
class Model:
    """A kind of model: what is written beside the metadata that all have, and its heads.

    Attributes
    ----------
    arch : str
    build : callable
        Adds metadata; returns the shapes of one layer and of the model.
    n_head, n_head_kv : int
    head_k, head_v : int
        Numbers of a head.
    v_in_k : bool
        Whether V is the first numbers of K.
    has_output : bool
        Whether the logits have weights of their own.
    """

    arch: str
    build: Callable[[Model, GGUFWriter], tuple[Shapes, Shapes]]
    n_head: int = N_HEAD
    n_head_kv: int = N_HEAD_KV
    head_k: int = N_EMBD_HEAD
    head_v: int = N_EMBD_HEAD
    has_output: bool = True
    v_in_k: bool = False

    @property
    def embd_k(self) -> int:
        """Numbers of K per token and layer."""
        return self.n_head_kv * self.head_k

    @property
    def embd_v(self) -> int:
        """Numbers of V per token and layer that are kept."""
        return 0 if self.v_in_k else self.n_head_kv * self.head_v

    @property
    def attention(self) -> Shapes:
        """Shapes of plain projections."""
        return {
            "attn_q.weight": (self.n_head * self.head_k, N_EMBD),
            "attn_k.weight": (self.embd_k, N_EMBD),
            "attn_v.weight": (self.n_head_kv * self.head_v, N_EMBD),
            "attn_output.weight": (N_EMBD, self.n_head * self.head_v),
        }


def _llama(model: Model, _: GGUFWriter) -> tuple[Shapes, Shapes]:
    return NORMS | model.attention | GATED_FFN, {}


def _llama3_factors(model: Model, _: GGUFWriter) -> tuple[Shapes, Shapes]:
    return NORMS | model.attention | GATED_FFN, {"rope_freqs.weight": (N_EMBD_HEAD // 2,)}


def _add_yarn(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(N_CTX // 4)


def _yarn(model: Model, writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    _add_yarn(writer)
    return NORMS | model.attention | GATED_FFN, {}


def _qwen2(model: Model, _: GGUFWriter) -> tuple[Shapes, Shapes]:
    return NORMS | model.attention | QKV_BIAS | GATED_FFN, {}


def _qwen3(model: Model, _: GGUFWriter) -> tuple[Shapes, Shapes]:
    return NORMS | model.attention | QK_NORM | GATED_FFN, {}


def _stablelm(model: Model, writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD_HEAD // 2)
    writer.add_parallel_residual(False)
    bias = {"attn_norm.bias": (N_EMBD,), "ffn_norm.bias": (N_EMBD,)}
    return NORMS | bias | model.attention | GATED_FFN, {"output_norm.bias": (N_EMBD,)}


def _gpt2(_: Model, writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    writer.add_layer_norm_eps(1e-5)
    return GPT2, {"position_embd.weight": (N_CTX, N_EMBD), "output_norm.bias": (N_EMBD,)}


def _latent(model: Model, writer: GGUFWriter) -> Shapes:
    """Projections of keys and values that are made from one latent vector, and of the output."""
    writer.add_rope_dimension_count(N_ROT)
    writer.add_kv_lora_rank(N_LORA)
    return {
        "attn_kv_a_mqa.weight": (N_LORA + N_ROT, N_EMBD),
        "attn_kv_a_norm.weight": (N_LORA,),
        "attn_kv_b.weight": (model.n_head * (model.head_k - N_ROT + model.head_v), N_LORA),
        "attn_output.weight": (N_EMBD, model.n_head * model.head_v),
    }


def _minicpm3(model: Model, writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    writer.add_q_lora_rank(N_LORA)
    queries: Shapes = {
        "attn_q_a.weight": (N_LORA, N_EMBD),
        "attn_q_a_norm.weight": (N_LORA,),
        "attn_q_b.weight": (model.n_head * model.head_k, N_LORA),
    }
    return NORMS | queries | _latent(model, writer) | GATED_FFN, {}


def _plm(model: Model, writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    queries: Shapes = {"attn_q.weight": (model.n_head * model.head_k, N_EMBD)}
    return NORMS | queries | _latent(model, writer) | UNGATED_FFN, {}


def _deepseek2(model: Model, writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    writer.add_rope_dimension_count(N_ROT)
    writer.add_q_lora_rank(N_LORA)
    writer.add_kv_lora_rank(N_LATENT)
    writer.add_key_length_mla(N_EMBD_HEAD + N_ROT)
    writer.add_value_length_mla(N_EMBD_HEAD)
    writer.add_leading_dense_block_count(N_LAYER)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_expert_shared_count(1)
    attention: Shapes = {
        "attn_q_a.weight": (N_LORA, N_EMBD),
        "attn_q_a_norm.weight": (N_LORA,),
        "attn_q_b.weight": (model.n_head * (N_EMBD_HEAD + N_ROT), N_LORA),
        "attn_kv_a_mqa.weight": (N_LATENT + N_ROT, N_EMBD),
        "attn_kv_a_norm.weight": (N_LATENT,),
        "attn_k_b.weight": (model.n_head, N_LATENT, N_EMBD_HEAD),
        "attn_v_b.weight": (model.n_head, N_EMBD_HEAD, N_LATENT),
        "attn_output.weight": (N_EMBD, model.n_head * N_EMBD_HEAD),
    }
    return NORMS | attention | GATED_FFN, {}


def _deepseek2_yarn(model: Model, writer: GGUFWriter) -> tuple[Shapes, Shapes]:
    _add_yarn(writer)
    writer.add_rope_scaling_yarn_log_mul(0.1)
    return _deepseek2(model, writer)


MODELS = {
    "llama": Model("llama", _llama),
    "llama-gqa": Model("llama", _llama, n_head=10, n_head_kv=2),
    "llama-heads-of-20": Model("llama", _llama, head_k=20, head_v=20),
    "llama-heads-of-288": Model("llama", _llama, head_k=288, head_v=288),
    "llama-sinks": Model("llama", _llama),
    "llama3-factors": Model("llama", _llama3_factors),
    "llama-yarn": Model("llama", _yarn),
    "qwen2": Model("qwen2", _qwen2),
    "qwen3": Model("qwen3", _qwen3),
    "stablelm": Model("stablelm", _stablelm),
    "gpt2": Model("gpt2", _gpt2, n_head_kv=N_HEAD),
    "minicpm3": Model("minicpm3", _minicpm3, n_head_kv=N_HEAD, head_k=32 + N_ROT),
    "deepseek2": Model("deepseek2", _deepseek2, head_k=N_LATENT + N_ROT, head_v=N_LATENT, v_in_k=True),
    "deepseek2-yarn": Model("deepseek2", _deepseek2_yarn, head_k=N_LATENT + N_ROT, head_v=N_LATENT, v_in_k=True),
}
# a group of all layers is wider than online bases turn as a whole
WIDE = {"llama-wide": Model("llama", _llama, n_head=3, n_head_kv=3, head_k=128, head_v=128)}
# models that an xkv cache refuses
REFUSED = {"plm": Model("plm", _plm, n_head_kv=N_HEAD, head_k=32 + N_ROT, has_output=False)}


def write_model(name: str, path: Path, seed: int = 0, text: bool = False) -> dict[str, np.ndarray]:
    """Write the model called `name`, with a byte tokenizer if it is for text; returns its tensors by name, f32."""
    n_vocab = BYTE_VOCAB if text else N_VOCAB
    kind = (MODELS | WIDE | REFUSED)[name]
    writer = GGUFWriter(path, kind.arch)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(kind.n_head)
    writer.add_head_count_kv(kind.n_head_kv)
    writer.add_key_length(kind.head_k)
    writer.add_value_length(kind.head_v)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(n_vocab)
    if text:
        add_byte_tokenizer(writer)
    else:
        writer.add_tokenizer_model("none")
    layer, model = kind.build(kind, writer)
    shapes: Shapes = {
        "token_embd.weight": (n_vocab, N_EMBD),
        "output_norm.weight": (N_EMBD,),
        **({"output.weight": (n_vocab, N_EMBD)} if kind.has_output else {}),
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
            value = rng.normal(0, 0.3 if any(part in key for part in LARGE) else 0.15, shape)
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
