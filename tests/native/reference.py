"""The llama architecture with an xKV cache in plain NumPy (f64): what the native graphs have to compute.

Micro-batch by micro-batch, as the cache does: before each one, whole chunks of the oldest tokens are replaced by
their projections, with keys rotated back by their chunk's first position (DESIGN of chunk-frame RoPE).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .sidecars import N_SINK, N_WINDOW, Bases
from .tiny_models import N_EMBD_HEAD, N_HEAD, N_LAYER

F64 = Any  # array of float64
ROPE_BASE = 10000.0


def rotate(x: F64, pos: F64) -> F64:
    """RoPE on pairs (2i, 2i + 1): x [n, n_head, n_embd_head], pos [n]."""
    half = x.shape[-1] // 2
    angle = np.asarray(pos)[:, None] * ROPE_BASE ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def rms_norm(x: F64, weight: F64) -> F64:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


class Reference:
    """One sequence of a tiny llama model; `bases` None keeps everything exact."""

    def __init__(self, tensors: dict[str, F64], bases: Bases | None, rank: int, n_ubatch: int = 64) -> None:
        self.w = {name: value.astype(np.float64) for name, value in tensors.items()}
        self.bases = bases
        self.rank = rank
        self.n_cell = 0 if bases is None else -(-(N_SINK + N_WINDOW + bases.frame + n_ubatch) // 32) * 32
        self.k: list[F64] = [np.zeros((0, 1, N_EMBD_HEAD))] * N_LAYER
        self.v: list[F64] = [np.zeros((0, 1, N_EMBD_HEAD))] * N_LAYER
        self.n_stored = 0  # tokens after the sinks that are projections

    def n_tokens(self) -> int:
        return len(self.k[0])

    def decode(self, tokens: Sequence[int]) -> F64:
        """Logits [n, n_vocab] of one micro-batch."""
        self._flush(len(tokens))
        w = self.w
        p0 = self.n_tokens()
        pos = p0 + np.arange(len(tokens))
        x = w["token_embd.weight"][list(tokens)]
        for il in range(N_LAYER):
            x = x + self._attention(rms_norm(x, w[f"blk.{il}.attn_norm.weight"]), pos, il)
            h = rms_norm(x, w[f"blk.{il}.ffn_norm.weight"])
            gate = h @ w[f"blk.{il}.ffn_gate.weight"].T
            up = h @ w[f"blk.{il}.ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"blk.{il}.ffn_down.weight"].T
        return rms_norm(x, w["output_norm.weight"]) @ w["output.weight"].T

    def _attention(self, h: F64, pos: F64, il: int) -> F64:
        w, n = self.w, len(h)
        q = rotate((h @ w[f"blk.{il}.attn_q.weight"].T).reshape(n, N_HEAD, -1), pos)
        k = rotate((h @ w[f"blk.{il}.attn_k.weight"].T).reshape(n, 1, -1), pos)
        v = (h @ w[f"blk.{il}.attn_v.weight"].T).reshape(n, 1, -1)
        self.k[il] = np.concatenate([self.k[il], k])
        self.v[il] = np.concatenate([self.v[il], v])
        scores = np.einsum("qhd,kd->hqk", q, self.k[il][:, 0]) / np.sqrt(N_EMBD_HEAD)
        scores = np.where(np.arange(len(self.k[il])) <= pos[:, None], scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = np.einsum("hqk,kd->qhd", p, self.v[il][:, 0])
        return out.reshape(n, -1) @ w[f"blk.{il}.attn_output.weight"].T

    def _flush(self, n_new: int) -> None:
        if self.bases is None or self.n_tokens() - self.n_stored + n_new <= self.n_cell:
            return
        n_exact = self.n_tokens() - N_SINK - self.n_stored
        for _ in range((n_exact - N_WINDOW) // self.bases.frame):
            self._compress(N_SINK + self.n_stored)
            self.n_stored += self.bases.frame

    def _compress(self, first: int) -> None:
        assert self.bases is not None
        chunk = slice(first, first + self.bases.frame)
        origin = np.full(self.bases.frame, first)
        for g, layers in enumerate(self.bases.groups):
            scale_k, scale_v = self.bases.scale["k"], self.bases.scale["v"]
            k = np.concatenate([scale_k[il] * rotate(self.k[il][chunk], -origin)[:, 0] for il in layers], axis=1)
            v = np.concatenate([scale_v[il] * self.v[il][chunk][:, 0] for il in layers], axis=1)
            for i, il in enumerate(layers):
                part = slice(i * N_EMBD_HEAD, (i + 1) * N_EMBD_HEAD)
                self.k[il][chunk] = rotate(self._project(k, "k", g)[:, None, part] / scale_k[il], origin)
                self.v[il][chunk] = self._project(v, "v", g)[:, None, part] / scale_v[il]

    def _project(self, x: F64, kind: str, g: int) -> F64:
        assert self.bases is not None
        basis = self.bases.basis[kind][g][: self.rank].astype(np.float64)
        mean = self.bases.mean[kind][g].astype(np.float64)
        return (x - mean) @ basis.T @ basis + mean
