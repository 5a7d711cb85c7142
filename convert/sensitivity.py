"""How much the model minds what is lost in each group of layers, in K and in V: measured, not derived.

One kind of one group at a time is stored coarsely, all others at full rank in q8_0, and the divergence of the model's
predictions from those on an f16 cache is divided by the distortion. On SmolLM2 the results differ by a factor of
twenty between groups, and add up: the sum over groups is close to what coding all of them costs.

There are two texts. One is calibration text as it is. The other ends with a repetition of tokens from its beginning, so
that the model looks them up: text that it writes itself seldom makes it look far back, prompts of users do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xkv_gguf.base.divergence import kl_divergence, log_softmax
from xkv_gguf.convert.engine import Engine
from xkv_gguf.plan.coef_types import DEFAULT_TYPES, basis_types
from xkv_gguf.plan.segments import (
    KINDS,
    MAX_SEGMENTS,
    Kind,
    Prices,
    Segment,
    Statistics,
    distortion,
    plan_segments,
    same_rank,
)
from xkv_gguf.runtime.native import ScopeParams

N_TOKEN = 1024
"""Tokens of a text; the last `N_SCORE` are scored."""

N_SCORE = 256
N_REPEAT_AT = 100
N_WINDOW = 32
N_TEXT_SINK = 32
N_UBATCH = 256
COEF_RATIO = 16.0
"""f16 bytes per token over coefficient bytes per token of the coarse plan."""

LEAST = 0.05
"""Smallest weight, as a share of the largest: what is below is noise of the measurement."""

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
    return len(_texts(sequences)) > 0 and _coarse(stats, quantizable=True) is not None


def n_run(stats: Statistics) -> int:
    """Caches that `measure` runs."""
    return 3 + len(stats.first) * len(KINDS)


def measure(
    engine: Engine,
    sidecar: Path,
    stats: Statistics,
    quantizable: bool,
    sequences: Sequence[Sequence[int]],
    progress: Callable[[int], object],
    remembered: Callable[[Sequence[Segment], Callable[[], list[float]]], list[float]],
) -> Sensitivity:
    """Measure the weights of a model's groups.

    Parameters
    ----------
    engine : Engine
        The model; its context is replaced.
    sidecar : Path
        The model's bases.
    stats : Statistics
        Of the sidecar; its weights are ignored.
    quantizable : bool
        Whether heads are multiples of 32, so that bases can be q8_0.
    sequences : sequence of sequences of int
        Token ids of calibration text; see `measurable`.
    progress : callable
        Gets 1 after each cache.
    remembered : callable
        Gets a cache's segments and what computes its divergences; returns them, computed now or at some other time.

    Returns
    -------
    Sensitivity
    """
    texts = _texts(sequences)
    equal = replace(stats, weights={kind: (1.0,) * len(stats.first) for kind in KINDS})
    coarse = _coarse(equal, quantizable)
    assert coarse is not None
    fine = same_rank(equal, None, "q8_0", basis_types(quantizable)["q8_0"])

    def scores(segments: Sequence[Segment] | None) -> list[F32]:
        params = None
        if segments is not None:
            params = ScopeParams(
                segments=tuple(segments), sidecar=str(sidecar), n_text_sink=N_TEXT_SINK, n_window=N_WINDOW, online=False
            )
        engine.open_context(1, N_TOKEN, params, N_UBATCH)
        result = [_score(engine, text) for text in texts]
        engine.close_context()
        return result

    exact = scores(None)
    progress(1)

    def divergence(segments: Sequence[Segment]) -> Floats:
        def compute() -> list[float]:
            pairs = zip(exact, scores(segments), strict=True)
            return [float(kl_divergence(a.astype(np.float64), b.astype(np.float64)).mean()) for a, b in pairs]

        found = remembered(segments, compute)
        progress(1)
        return np.array(found)

    base = divergence(fine)
    sources = [(g, kind) for g in range(len(stats.first)) for kind in KINDS]
    slopes: dict[Source, Floats] = {}
    losses: dict[Source, float] = {}
    for source in sources:
        mixed = [s for other in sources for s in _of(coarse if other == source else fine, other)]
        losses[source] = distortion(_only(equal, source), mixed)
        slopes[source] = np.zeros(len(base))
        if losses[source] > 0:  # K or V that never vary lose nothing
            slopes[source] = (divergence(mixed) - base) / losses[source]
    total = divergence(coarse) - base
    return _weights(slopes, losses, float(total[0]))


def _weights(slopes: dict[Source, Floats], losses: dict[Source, float], total: float) -> Sensitivity:
    """Weights from divergence per distortion of each source and text.

    Texts count the same. The scale comes from what all sources cost together on the first text.
    """
    n_group = len(slopes) // len(KINDS)
    table = np.array(list(slopes.values()))  # [source, text]
    largest = table.max(axis=0)
    if not (largest > 0).all():  # nothing but noise: all count the same
        return Sensitivity(dict.fromkeys(KINDS, (1.0,) * n_group), 0.0)
    table = np.maximum(table, LEAST * largest)
    means = (table / table.mean(axis=0)).mean(axis=1)
    # few digits, so that rounding in the model's arithmetic does not show
    weights = {source: float(f"{weight:.2g}") for source, weight in zip(slopes, means, strict=True)}
    predicted = sum(weights[source] * losses[source] for source in weights)
    scale = float(f"{max(total, 0.0) / predicted:.2g}")
    return Sensitivity({kind: tuple(weights[g, kind] for g in range(n_group)) for kind in KINDS}, scale)


def _texts(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Two texts of `N_TOKEN` tokens, see the top of this module; none where there are too few tokens."""
    tokens = [token for sequence in sequences for token in sequence]
    if len(tokens) < 2 * N_TOKEN:
        return []
    plain, other = tokens[:N_TOKEN], tokens[N_TOKEN : 2 * N_TOKEN]
    return [plain, other[:-N_SCORE] + other[N_REPEAT_AT : N_REPEAT_AT + N_SCORE]]


def _coarse(stats: Statistics, quantizable: bool) -> tuple[Segment, ...] | None:
    numbers = sum(len(spectrum) for kind in KINDS for spectrum in stats.spectra[kind])
    prices = Prices(1, basis_types(quantizable), with_bases=False)
    return plan_segments(stats, DEFAULT_TYPES, MAX_SEGMENTS, prices, 2 * numbers / COEF_RATIO)


def _of(segments: Sequence[Segment], source: Source) -> list[Segment]:
    return [s for s in segments if (s.group, s.kind) == source]


def _only(stats: Statistics, source: Source) -> Statistics:
    """Statistics in which nothing else counts."""
    weights = {kind: tuple(float((g, kind) == source) for g in range(len(stats.first))) for kind in KINDS}
    return replace(stats, weights=weights)


def _score(engine: Engine, text: list[int]) -> F32:
    """Log-probabilities after each of the last tokens, shape (N_SCORE, n_vocab)."""
    engine.clear()
    for start in range(0, N_TOKEN, N_UBATCH):
        part = text[start : start + N_UBATCH]
        engine.decode(part, [0] * len(part), list(range(start, start + len(part))), start >= N_TOKEN - N_SCORE)
    result: F32 = log_softmax(engine.logits(N_SCORE).astype(np.float64)).astype(np.float32)
    return result
