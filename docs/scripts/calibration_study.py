"""How well bases from different calibration texts fit texts that none of them has seen.

Calibrates a model on several texts with the same settings and prints two Markdown tables: the residual energy of
held-out texts (the share of the variance of K and V that the planned directions lose), and the mean Kullback-Leibler
divergence of the next-token distribution from the f16 cache's. docs/calibration.md reports the first one.

    python docs/scripts/calibration_study.py --model MODEL.gguf \
        --calibrate "mixed=prose.txt,code.py,docs.md" --calibrate "prose=prose.txt" \
        --held-out "prose=other.txt" --held-out "code=other.py" --held-out "docs=other.md"

Text by the model itself is always among the calibration texts, once for each of --seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xkv_gguf.convert.calibrate import collect, file_sequences
from xkv_gguf.convert.capture import Sums
from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.pipeline import convert
from xkv_gguf.convert.settings import TOKENS, Settings
from xkv_gguf.convert.solve import residual_energy, solve_gram
from xkv_gguf.model.file import open_model
from xkv_gguf.opening import scope_params
from xkv_gguf.options import XkvOptions
from xkv_gguf.plan.cache_plan import CachePlan
from xkv_gguf.plan.groups import LayerGroups
from xkv_gguf.plan.segments import KINDS, Kind
from xkv_gguf.plan.size_target import SizeTarget
from xkv_gguf.runtime import native
from xkv_gguf.sidecar.read import Sidecar, read_sidecar

AllSums = dict[tuple[int, Kind], Sums]


@dataclass(frozen=True)
class Text:
    """A held-out text: sums over it, and passages for the divergence."""

    name: str
    sums: AllSums
    passages: list[list[int]]


def mean_residual(sums: AllSums, sidecar: Sidecar, plan: CachePlan, kind: Kind) -> float:
    """Residual energy of the planned directions, mean over the groups."""
    shares = []
    for g in range(len(sidecar.info.groups)):
        s = sums[g, kind]
        rank = sum(segment.rank for segment in plan.of(g, kind))
        basis, mean = np.asarray(sidecar.basis(g, kind)), np.asarray(sidecar.mean(g, kind), dtype=np.float64)
        shares.append(residual_energy(s.gram, s.total, s.n_tokens, basis, mean, rank))
    return float(np.mean(shares))


def own_residual(sums: AllSums, plan: CachePlan, kind: Kind) -> float:
    """The same for a basis made from the held-out text itself, with the same ranks: the least that can be had."""
    shares = []
    for (g, other), s in sums.items():
        if other == kind:
            spectrum = solve_gram(s.gram, s.total, s.n_tokens, kind).spectrum
            rank = sum(segment.rank for segment in plan.of(g, kind))
            shares.append(float(spectrum[rank:].sum() / spectrum.sum()))
    return float(np.mean(shares))


def log_probabilities(engine: Engine, passage: list[int], n_scored: int) -> npt.NDArray[np.float32]:
    """Log of the next-token distributions at the last `n_scored` tokens of a passage, in the engine's context."""
    n_prefix = len(passage) - n_scored
    for start in range(0, n_prefix, engine.n_batch):
        part = passage[start : min(start + engine.n_batch, n_prefix)]
        engine.decode(part, [0] * len(part), list(range(start, start + len(part))), outputs=False)
    engine.decode(passage[n_prefix:], [0] * n_scored, list(range(n_prefix, len(passage))), outputs=True)
    logits = engine.logits(n_scored).astype(np.float32)
    engine.clear()
    logits -= logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float32] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return result


def divergence(exact: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Mean Kullback-Leibler divergence in nats."""
    return float((np.exp(exact) * (exact - other)).sum(axis=1, dtype=np.float64).mean())


def measure_text(engine: Engine, groups: LayerGroups, settings: Settings, name: str, n_passage: int) -> Text:
    """Collect a held-out text's sums and cut its passages."""
    n_token = settings.n_token(max(max(dims) for dims in groups.dims.values()))
    texts = file_sequences(engine, settings, n_token)
    sums: AllSums = {}

    def keep(g: int, kind: Kind, found: Sums) -> None:
        sums[g, kind] = found

    collect(engine, groups, settings, n_token, texts, lambda _n: None, keep)
    whole = [token for text in texts for token in text]
    return Text(name, sums, [whole[i : i + n_passage] for i in range(0, len(whole) - n_passage + 1, n_passage)][:2])


def files_by_name(values: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    """Read NAME=FILE,FILE,..."""
    pairs = (value.partition("=") for value in values)
    return {name: tuple(map(Path, files.split(","))) for name, _, files in pairs}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibrate", action="append", default=[], metavar="NAME=FILE,...")
    parser.add_argument("--held-out", action="append", required=True, metavar="NAME=FILE,...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[TOKENS])
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=4096, help="tokens of a passage for the divergence")
    parser.add_argument("--scored", type=int, default=512, help="tokens at its end that are scored")
    parser.add_argument("--coef-ratio", type=float, default=8.0)
    parser.add_argument("--types", default="q8_0+q5_0+q4_0+q2_0+q1_0", help="of coefficients")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    base = Settings(target=SizeTarget.of("coef_ratio", args.coef_ratio), threads=args.threads)
    runs: dict[str, Settings] = {}
    for tokens in args.tokens:
        for seed in args.seeds:
            runs[f"self, {tokens} tokens, seed {seed}"] = replace(base, tokens=tokens, seed=seed)
        for name, data in files_by_name(args.calibrate).items():
            runs[f"{name}, {tokens} tokens"] = replace(base, tokens=tokens, data=data)

    with tempfile.TemporaryDirectory() as temp:
        sidecars = {}
        for i, (name, settings) in enumerate(runs.items()):
            sidecars[name] = read_sidecar(convert(args.model, Path(temp) / f"{i}.xkv.gguf", settings).path)
        info = next(iter(sidecars.values())).info
        groups = LayerGroups.of([g.layers for g in info.groups], info.embd_k, info.embd_v)
        with Engine(args.model, args.threads) as engine:
            held_out = [
                measure_text(engine, groups, replace(base, tokens=args.held_out_tokens, data=data), name, args.context)
                for name, data in files_by_name(args.held_out).items()
            ]
            exact: dict[str, list[npt.NDArray[np.float32]]] = {}
            engine.open_context(1, args.context)
            for text in held_out:
                exact[text.name] = [log_probabilities(engine, p, args.scored) for p in text.passages]
            residual_rows, divergence_rows = [], []
            plans = {}
            for name, sidecar in sidecars.items():
                # bases that stay as calibrated: this is what is compared
                options = XkvOptions(sidecar=str(sidecar.path), types=args.types, online=False)
                planned = scope_params(sidecar, options, args.context, None, open_model(args.model))
                plans[name] = planned.plan
                row: list[str] = []
                for text in held_out:
                    row.append(
                        " / ".join(f"{mean_residual(text.sums, sidecar, plans[name], kind):.3f}" for kind in KINDS)
                    )
                residual_rows.append([name, *row])
                with native.scope(planned.params):
                    engine.open_context(1, args.context)
                row = []
                for text in held_out:
                    found = [log_probabilities(engine, p, args.scored) for p in text.passages]
                    pairs = zip(exact[text.name], found, strict=True)
                    row.append(f"{np.mean([divergence(a, b) for a, b in pairs]):.4f}")
                divergence_rows.append([name, *row])
            plan = next(iter(plans.values()))
            own = [" / ".join(f"{own_residual(text.sums, plan, k):.3f}" for k in KINDS) for text in held_out]
            residual_rows.append(["the held-out text itself", *own])
    head = ["calibrated on", *(text.name for text in held_out)]
    print(f"Residual energy at coefficient ratio {args.coef_ratio:g}, K / V:\n\n{table(head, residual_rows)}\n")
    print(f"Mean KL divergence from f16, nats:\n\n{table(head, divergence_rows)}")


if __name__ == "__main__":
    main()
