"""What stages lose: K and V of a text, from an f16 cache, taken through stages with noise in place of rounding.

Each stage computes bases of what is left of the tokens before it and of the calibrated covariance, and codes these
tokens and the next ones in the segments that the planner gives it. Printed: the distortion that plans minimize, over
all tokens and over the last tenth; attention sinks are left out. docs/lab/2026-11-quality.md reports it.

    python docs/scripts/stage_study.py MODEL.gguf SIDECAR TEXT.txt --ratio 7 --ends 1792,5376 1792,4096 static prompt

`static` has the calibrated bases, `prompt` those of the text itself. Models of the Llama kind only (pairs of neighbours
are turned by RoPE).
"""

from __future__ import annotations

import argparse
import ctypes
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from xkv_gguf import Llama
from xkv_gguf.model.gguf_read import read_header
from xkv_gguf.plan.cache_plan import CachePlan, plan_cache
from xkv_gguf.plan.coef_types import TYPES, basis_types
from xkv_gguf.plan.segments import KINDS, MAX_SEGMENTS, Kind, Prices, Segment, Statistics, plan_segments
from xkv_gguf.plan.size_target import SizeTarget
from xkv_gguf.plan.sizes import ModelShape, mean_bytes, window_bytes
from xkv_gguf.plan.wishes import Wishes
from xkv_gguf.runtime.shape import file_shape
from xkv_gguf.sidecar.read import Sidecar, read_sidecar

F32 = npt.NDArray[np.float32]
SINK = 6.0
"""Tokens with so many times the median energy are left out."""


def capture(model: Path, text: Path, n_token: int, shape: ModelShape) -> dict[Kind, list[F32]]:
    """K and V of each layer, shape (n_token, n_embd), as an f16 cache holds them."""
    import llama_cpp  # after xkv_gguf: only one libllama can be loaded

    llm = Llama(str(model), n_ctx=n_token + 64, kv_mode="f16", verbose=False)
    tokens = llm.tokenize(text.read_bytes())[:n_token]
    llm.eval(tokens)
    size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    llama_cpp.llama_state_seq_get_data(llm.ctx, buffer, size, 0)
    data = bytes(buffer)
    at = data.index(struct.pack("<IIiQ", 0, len(shape.embd_k), 1, 2 * shape.embd_k[0])) + 8
    found: dict[Kind, list[F32]] = {"k": [], "v": []}
    for kind, sizes in zip(KINDS, (shape.embd_k, shape.embd_v), strict=True):
        for n_embd in sizes:
            at += 12  # type and size of a row
            rows = np.frombuffer(data, np.float16, len(tokens) * n_embd, at)
            found[kind].append(rows.reshape(-1, n_embd).astype(np.float32))
            at += 2 * rows.size
    return found


def to_frames(k: F32, head: int, frame: int, base: float) -> F32:
    """K, shape (n_token, n_embd), turned back to the beginning of each chunk."""
    angle = -(np.arange(len(k)) // frame * frame)[:, None] * base ** (-np.arange(0, head, 2) / head)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, y = np.moveaxis(k.reshape(len(k), -1, head // 2, 2), 3, 0)
    return np.stack([x * cos - y * sin, x * sin + y * cos], 3).reshape(k.shape).astype(np.float32)


def directions(cov: npt.NDArray[np.float64], rank: int) -> F32:
    """The first eigenvectors as rows."""
    rows = torch.linalg.eigh(torch.from_numpy(cov))[1].numpy().T[::-1][:rank]
    return np.ascontiguousarray(rows, np.float32)


@dataclass(frozen=True)
class Study:
    """One kind of one group: tokens without their mean, shape (n_token, dim), and what is known before them."""

    x: F32
    weight: float
    bases: F32
    prior: npt.NDArray[np.float64]
    rng: np.random.Generator

    def coded(self, coef: F32, noise: npt.NDArray[np.float64]) -> F32:
        """Coefficients with the noise of their types, relative to 32 tokens' mean square."""
        blocks = np.pad(coef, ((0, -len(coef) % 32), (0, 0))).reshape(-1, 32, coef.shape[1])
        spread = np.sqrt(noise * (1 - noise) * (blocks**2).mean(1, keepdims=True))
        result = blocks * (1 - noise) + spread * self.rng.standard_normal(blocks.shape)
        return result.reshape(-1, coef.shape[1])[: len(coef)].astype(np.float32)

    def once(self, bases: F32, noise: npt.NDArray[np.float64]) -> F32:
        """All tokens, coded once."""
        used = bases[: len(noise)]
        return self.coded(self.x @ used.T, noise) @ used

    def staged(self, ends: list[int], noises: list[npt.NDArray[np.float64]]) -> F32:
        """The tokens after the stages; the first one is plain and ends at ends[0], the others have noises."""
        kept = self.x[: ends[0]]
        for begin, end, noise in zip(ends, [*ends[1:], len(self.x)], noises, strict=True):
            used = directions((kept.T @ kept).astype(np.float64) + self.prior, len(noise))
            parts = (kept, self.x[begin:end])
            kept = np.concatenate([self.coded(part @ used.T, noise) @ used for part in parts])
        return kept

    def loss(self, kept: F32) -> npt.NDArray[np.float64]:
        """Weighted distortion of all tokens and of the last tenth."""
        energy = (self.x**2).sum(1)
        text = energy < SINK * np.median(energy)
        lost = np.where(text, ((self.x - kept) ** 2).sum(1), np.nan) / energy[text].mean() * self.weight
        return np.array([np.nanmean(lost), np.nanmean(lost[len(lost) * 9 // 10 :])])


def noise_of(segments: tuple[Segment, ...], group: int, kind: Kind, dim: int) -> npt.NDArray[np.float64]:
    """Noise of each direction's type."""
    own = [s for s in segments if (s.group, s.kind) == (group, kind)]
    return np.repeat([TYPES[s.type].noise for s in own], [s.rank for s in own])[:dim]


def segments_for(n_slot: int, stats: Statistics, shape: ModelShape, plan: CachePlan) -> tuple[Segment, ...]:
    """What the planner gives a stage in the full store's bytes."""
    budget = plan.total_bytes - window_bytes(shape, plan.layout) - mean_bytes(shape)
    found = plan_segments(stats, Wishes(n_ctx=0).types, MAX_SEGMENTS, Prices(n_slot, basis_types(True)), budget)
    assert found is not None
    return found


def studies(sidecar: Sidecar, captured: dict[Kind, list[F32]], n_prior: float) -> dict[tuple[int, Kind], Study]:
    """By group and kind."""
    stats, rng, result = sidecar.statistics(), np.random.default_rng(0), {}
    for g, layers in enumerate(stats.layers):
        for kind in KINDS:
            bases = np.array(sidecar.basis(g, kind), np.float32)
            prior = (bases.T * np.asarray(stats.spectra[kind][g][: len(bases)], np.float64)) @ bases * n_prior
            x = np.concatenate([captured[kind][il] for il in layers], 1) - np.asarray(sidecar.mean(g, kind))
            result[g, kind] = Study(x, stats.weights[kind][g], bases, prior, rng)
    return result


def main() -> None:
    """Print a line per list of stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("sidecar", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--ratio", default="7")
    parser.add_argument("--n-ctx", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=7680)
    parser.add_argument("--n-prior", type=float, default=2000.0)
    parser.add_argument("--ends", nargs="+", default=["static", "prompt"])
    args = parser.parse_args()
    header, sidecar = read_header(args.model), read_sidecar(args.sidecar)
    shape, stats = file_shape(args.model), sidecar.statistics()
    plan = plan_cache(stats, shape, Wishes(n_ctx=args.n_ctx, target=SizeTarget("ratio", args.ratio)))
    captured = capture(args.model, args.text, args.tokens, shape)
    base = float(header.fields["llama.rope.freq_base"].value)
    captured["k"] = [to_frames(k, shape.head_k, stats.frame, base) for k in captured["k"]]
    for kind in KINDS:
        captured[kind] = [s * x for s, x in zip(sidecar.info.scales(kind), captured[kind], strict=True)]
    parts = studies(sidecar, captured, args.n_prior)
    for name in args.ends:
        ends = [] if name in ("static", "prompt") else [int(end) for end in name.split(",")]
        plans = [*(segments_for(end, stats, shape, plan) for end in ends[1:]), plan.segments]
        loss = np.zeros(2)
        for (g, kind), part in parts.items():
            noises = [noise_of(segments, g, kind, len(part.bases)) for segments in plans]
            if ends:
                kept = part.staged(ends, noises)
            else:
                own = directions((part.x.T @ part.x).astype(np.float64), len(part.bases))
                kept = part.once(part.bases if name == "static" else own, noises[-1])
            loss += part.loss(kept)
        print(f"{name}: all tokens {loss[0]:.3f}, the last tenth {loss[1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
