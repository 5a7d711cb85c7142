"""How much the model minds what is lost in each group of layers, in K and in V: measured, not derived.

A text is run once on a plain cache. Then one kind of one group at a time is replaced in that cache by what a coarse
code would make of it, the end of the text is run again, and the divergence of the predictions is divided by the
distortion. So each source costs a short run on a plain cache, and no xkv cache is made.

Any change at all of the cache makes the model round otherwise, and where weights are quantized that alone diverges as
much as a moderate loss does, however small the change. This is measured once, and taken off; losses are large ones, so
that much is left.

There are four texts, from different places of the calibration text. Every other one ends with a repetition of tokens
from its beginning, so that the model looks them up: few texts make it look far back, prompts of users do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from xkv_gguf.convert.capture import Capture
from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.solve import Basis
from xkv_gguf.plan.coef_types import DEFAULT_TYPES, TYPES, basis_types
from xkv_gguf.plan.groups import LayerGroups
from xkv_gguf.plan.segments import (
    KINDS,
    MAX_SEGMENTS,
    Kind,
    Prices,
    Segment,
    Statistics,
    distortion,
    plan_segments,
    sources,
)
from xkv_gguf.plan.sizes import ModelShape

N_TOKEN = 512
"""Tokens of a text, of which the last ones are scored."""

N_TEXT = 4
N_REPEAT_AT = 100
N_WINDOW = 32
N_TEXT_SINK = 32
TEXT_SINK = 0.05
"""Share of a layer's mean energy of V below which a token is an attention sink, which caches keep exact."""

COEF_RATIOS = (64.0, 32.0, 16.0)
"""f16 bytes per token over coefficient bytes per token of the coarse plan: the first that narrow groups allow."""

TINY = 1e-3
"""Noise as a share of each number's deviation, whose cost is that of rounding otherwise."""

LEAST = 0.05
"""Smallest weight, as a share of the largest: what is below is noise of the measurement."""

BLOCK = 64
"""Rows of logits that are compared at a time."""

F32 = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Source = tuple[int, Kind]


@dataclass(frozen=True)
class Sensitivity:
    """Weights by kind and group, of mean 1 or nearly, and nats of divergence per unit of weighted distortion."""

    weights: dict[Kind, tuple[float, ...]]
    kld_scale: float


def measurable(sequences: Sequence[Sequence[int]], stats: Statistics) -> bool:
    """Whether the text is long enough and the model large enough to be measured."""
    return sum(map(len, sequences)) >= N_TEXT * N_TOKEN and _coarse(stats, quantizable=True) is not None


def n_run(stats: Statistics) -> int:
    """Times that `measure` exchanges something in the cache."""
    return 2 + len(sources(stats))


def n_source(groups: LayerGroups) -> int:
    """What is kept of groups, K and V counted by themselves."""
    return sum(len(groups.kinds(g)) for g in range(len(groups.layers)))


def n_token(n_source: int, n_score: int) -> int:
    """Tokens that `measure` runs for so many sources: the texts, and their ends for each source and twice for all."""
    return N_TEXT * (N_TOKEN + n_score * (2 + n_source))


class _Bench:
    """The texts in a plain cache, their exact predictions, and what is exchanged in the cache."""

    def __init__(
        self, engine: Engine, capture: Capture, texts: list[list[int]], n_score: int, frame: int, n_sink: int
    ) -> None:
        self._engine, self._capture, self._texts = engine, capture, texts
        self._n_score, self._first = n_score, n_sink
        # whole chunks, all but the most recent tokens, as they leave a window
        self._n = (N_TOKEN - n_score - N_WINDOW - n_sink) // frame * frame
        for seq, text in enumerate(texts):
            self._run(seq, text[:-n_score], 0, outputs=False)
        self._kept = [np.ones(self._n, bool) for _ in texts]
        self._exact = [self._predict(seq) for seq in range(len(texts))]

    def _run(self, seq: int, tokens: Sequence[int], at: int, outputs: bool) -> None:
        step = self._engine.n_batch
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            positions = list(range(at + start, at + start + len(part)))
            self._engine.decode(part, [seq] * len(part), positions, outputs)

    def _predict(self, seq: int) -> F32:
        """Logits after each of the last tokens, shape (n_score, n_vocab)."""
        n_score = self._n_score
        with self._engine.branch(seq, N_TOKEN - n_score) as branch:
            self._run(branch, self._texts[seq][-n_score:], N_TOKEN - n_score, outputs=True)
            found: F32 = self._engine.logits(n_score).copy()
        return found

    def get(self, seq: int, source: Source) -> F32:
        """Chunk-frame numbers of a source that may be exchanged."""
        return self._capture.get(seq, *source, self._first, self._n)

    def keep_sinks(self, energies: Sequence[Floats], seq: int) -> None:
        """Leave attention sinks alone, given by the energies of V of each layer."""
        drain = np.min([e / max(float(e.mean()), 1e-30) for e in energies], axis=0)
        lowest = np.argsort(drain, kind="stable")[:N_TEXT_SINK]
        self._kept[seq][lowest[drain[lowest] < TEXT_SINK]] = False

    def divergences(self, sources: Sequence[Source], coded: Callable[[Source, F32], F32]) -> list[float]:
        """Mean divergence by text with some sources exchanged for what `coded` makes of them."""
        found = []
        for seq in range(len(self._texts)):
            before = [self.get(seq, source) for source in sources]
            for source, x in zip(sources, before, strict=True):
                chosen = self._kept[seq][:, None]
                self._capture.put(seq, *source, self._first, np.where(chosen, coded(source, x), x))
            found.append(mean_divergence(self._exact[seq], self._predict(seq)))
            for source, x in zip(sources, before, strict=True):
                self._capture.put(seq, *source, self._first, x)
        return found


def measure(
    engine: Engine,
    groups: LayerGroups,
    bases: Mapping[Source, Basis],
    stats: Statistics,
    n_sink: int,
    n_score: int,
    shape: ModelShape,
    sequences: Sequence[Sequence[int]],
    progress: Callable[[int], object],
    remembered: Callable[[Sequence[Segment], Callable[[], list[float]]], list[float]],
) -> Sensitivity:
    """Measure the weights of a model's groups.

    Parameters
    ----------
    engine : Engine
        The model; its context is replaced.
    groups : LayerGroups
    bases : mapping of group and kind to Basis
    stats : Statistics
        Of these bases; its weights are ignored.
    n_sink : int
        First tokens that stay exact.
    n_score : int
        Tokens of each text that are scored.
    shape : ModelShape
        Where heads are multiples of 32, bases can be q8_0.
    sequences : sequence of sequences of int
        Token ids of calibration text; see `measurable`.
    progress : callable
        Gets 1 after each run.
    remembered : callable
        Gets a source's segments and what computes its divergences; returns them, computed now or at some other time.

    Returns
    -------
    Sensitivity
    """
    texts = _texts(sequences, n_score)
    equal = replace(stats, weights={kind: (1.0,) * len(stats.layers) for kind in KINDS})
    coarse = _coarse(equal, shape.quantizable)
    assert coarse is not None
    kept: list[Source] = sources(stats)
    codes = {source: _of(coarse, source) for source in kept}

    def coded(source: Source, x: F32) -> F32:
        return coarse_copy(x, bases[source], codes[source], _noise(source))

    def nearly(source: Source, x: F32) -> F32:
        noise: F32 = _noise(source).standard_normal(x.shape, np.float32)
        return np.asarray(x + np.float32(TINY) * x.std(axis=0) * noise, np.float32)

    engine.open_context(len(texts), N_TOKEN)
    with Capture(engine, groups.layers, groups.dims, stats.frame, n_sink) as capture:
        bench = _Bench(engine, capture, texts, n_score, stats.frame, n_sink)
        for seq in range(len(texts)):
            energies = [e for g in range(len(stats.layers)) for e in _energies(bench, seq, groups, g, shape)]
            bench.keep_sinks(energies, seq)
        base = np.array(remembered((), lambda: bench.divergences(kept, nearly)))
        progress(1)
        slopes: dict[Source, Floats] = {}
        losses: dict[Source, float] = {}
        for source in kept:
            losses[source] = distortion(_only(equal, source), codes[source])
            slopes[source] = np.zeros(len(texts))
            if losses[source] > 0:  # K or V that never vary lose nothing

                def compute(source: Source = source) -> list[float]:
                    return bench.divergences([source], coded)

                slopes[source] = (np.array(remembered(codes[source], compute)) - base) / losses[source]
            progress(1)
        total = np.array(remembered(coarse, lambda: bench.divergences(kept, coded))) - base
        progress(1)
    engine.close_context()
    return _weights(slopes, losses, float(total[::2].mean()), len(stats.layers))


def _noise(source: Source) -> np.random.Generator:
    """The same noise whenever a source is coded."""
    return np.random.default_rng([source[0], KINDS.index(source[1])])


def coarse_copy(x: F32, basis: Basis, segments: Sequence[Segment], rng: np.random.Generator) -> F32:
    """What coding leaves of some tokens' numbers: dropped directions are lost, stored ones get their type's noise.

    Parameters
    ----------
    x : ndarray of float32, shape (n, D)
    basis : Basis
    segments : sequence of Segment
        Of this source.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of float32, shape (n, D)
    """
    rank = sum(segment.rank for segment in segments)
    rows, mean = basis.basis[:rank].astype(np.float32), basis.mean.astype(np.float32)
    noise = np.repeat([TYPES[s.type].noise + TYPES[s.type_basis].noise for s in segments], [s.rank for s in segments])
    a = (x - mean) @ rows.T
    a += rng.standard_normal(a.shape, np.float32) * (np.sqrt(noise) * a.std(axis=0)).astype(np.float32)
    copy: F32 = a @ rows + mean
    return copy


def mean_divergence(exact: F32, other: F32) -> float:
    """Mean Kullback-Leibler divergence over rows of logits, in nats."""
    total = 0.0
    for start in range(0, len(exact), BLOCK):
        p, q = (x[start : start + BLOCK] - x[start : start + BLOCK].max(axis=1, keepdims=True) for x in (exact, other))
        weight = np.exp(p)
        sums = weight.sum(axis=1, dtype=np.float64)
        mean_gap = np.einsum("ij,ij->i", weight, p - q, dtype=np.float64) / sums
        total += float((mean_gap - np.log(sums) + np.log(np.exp(q).sum(axis=1, dtype=np.float64))).sum())
    return max(total / len(exact), 0.0)


def _energies(bench: _Bench, seq: int, groups: LayerGroups, group: int, shape: ModelShape) -> list[Floats]:
    """Energy of V by token, of each layer of a group."""
    kind = groups.kinds(group)[-1]
    squares = np.square(bench.get(seq, (group, kind)).astype(np.float64))
    parts = np.split(squares, np.cumsum(groups.sizes(group, kind))[:-1], axis=1)
    if kind == "k":  # V is the first numbers of each head
        parts = [
            part.reshape(len(part), -1, shape.head_k)[:, :, : shape.head_v].reshape(len(part), -1) for part in parts
        ]
    return [part.sum(axis=1) for part in parts]


def _weights(slopes: dict[Source, Floats], losses: dict[Source, float], total: float, n_group: int) -> Sensitivity:
    """Weights from divergence per distortion of each source and text.

    Texts count the same. The scale comes from what all sources cost together on texts as they are.
    """
    table = np.array(list(slopes.values()))  # [source, text]
    table = table[:, table.max(axis=0) > 0]  # of other texts, nothing but noise was measured
    if table.shape[1] == 0:  # all count the same
        return Sensitivity(dict.fromkeys(KINDS, (1.0,) * n_group), 0.0)
    table = np.maximum(table, LEAST * table.max(axis=0))
    means = (table / table.mean(axis=0)).mean(axis=1)
    # few digits, so that rounding in the model's arithmetic does not show
    weights = {source: float(f"{weight:.2g}") for source, weight in zip(slopes, means, strict=True)}
    predicted = sum(weights[source] * losses[source] for source in weights)
    scale = float(f"{max(total, 0.0) / predicted:.2g}")
    by_kind = {kind: tuple(weights.get((g, kind), 1.0) for g in range(n_group)) for kind in KINDS}
    return Sensitivity(by_kind, scale)


def _texts(sequences: Sequence[Sequence[int]], n_score: int) -> list[list[int]]:
    """`N_TEXT` texts of `N_TOKEN` tokens, see the top of this module."""
    tokens = [token for sequence in sequences for token in sequence]
    step = len(tokens) // N_TEXT
    texts = [tokens[i * step : i * step + N_TOKEN] for i in range(N_TEXT)]
    return [
        text if i % 2 == 0 else text[:-n_score] + text[N_REPEAT_AT : N_REPEAT_AT + n_score]
        for i, text in enumerate(texts)
    ]


def _coarse(stats: Statistics, quantizable: bool) -> tuple[Segment, ...] | None:
    numbers = sum(len(spectrum) for kind in KINDS for spectrum in stats.spectra[kind])
    prices = Prices(1, basis_types(quantizable), basis_sets=0)
    plans = (plan_segments(stats, DEFAULT_TYPES, MAX_SEGMENTS, prices, 2 * numbers / ratio) for ratio in COEF_RATIOS)
    return next((plan for plan in plans if plan is not None), None)


def _of(segments: Sequence[Segment], source: Source) -> list[Segment]:
    return [s for s in segments if (s.group, s.kind) == source]


def _only(stats: Statistics, source: Source) -> Statistics:
    """Statistics in which nothing else counts."""
    weights = {kind: tuple(float((g, kind) == source) for g in range(len(stats.layers))) for kind in KINDS}
    return replace(stats, weights=weights)
