"""Runs a model over calibration text and collects the sums that bases need."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xkv_gguf.convert.capture import Capture, Sums
from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.estimate import F16, KV_BYTES, split_runs
from xkv_gguf.convert.sample import write_text
from xkv_gguf.convert.settings import Settings
from xkv_gguf.convert.text import cut_texts, package_texts, read_texts
from xkv_gguf.errors import CalibrationError
from xkv_gguf.plan.groups import LayerGroups
from xkv_gguf.plan.segments import KINDS, Kind
from xkv_gguf.plan.sizes import padded_ctx

FILE_LEN = 2048
"""Tokens per sequence of text that is read."""

SELF_LEN = 512
"""Tokens per sequence of text that the model writes."""

LEAST_LEN = 128
"""Fewest tokens that are worth writing, and of a sequence where more than two are written."""

SELF_SEQS = 32
"""Sequences that are written side by side."""

N_KEPT = 8
"""Sequences that are kept for measurements after calibration."""

Progress = Callable[[int], object]


@dataclass(frozen=True)
class TextInfo:
    """What was run: tokens in the sums, longest sequence in tokens, the hash of the text, and some of its sequences."""

    n_tokens: int
    n_len: int
    sha256: str
    kept: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class TextPlan:
    """What is to be run: sequences to read, and how many rounds of `n_seq` sequences of `n_len` tokens to write."""

    read: tuple[tuple[int, ...], ...]
    n_seq: int = 1
    n_len: int = 0
    n_round: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.n_len, *map(len, self.read), 0)

    @property
    def n_token(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.read)) + self.n_seq * self.n_len * self.n_round


def plan_text(engine: Engine, settings: Settings, n_token: int, numbers: int) -> TextPlan:
    """Choose about `n_token` tokens of text: the user's files; or the package's texts, and what lacks by the model.

    Parameters
    ----------
    engine : Engine
    settings : Settings
    n_token : int
    numbers : int
        Of K and V per token: the more of them, the fewer sequences are written side by side.

    Raises
    ------
    OptionError, CalibrationError
        A file cannot be used, or there is too little text.
    """
    limit, bos = engine.n_ctx_train, engine.bos()
    texts = read_texts(settings.data) if settings.data else package_texts()

    def cut(n_len: int) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, cut_texts(texts, engine.tokenize, bos, n_token, n_len, settings.seed)))

    read = cut(min(FILE_LEN, limit))
    missing = n_token - sum(map(len, read))
    if settings.data or missing < LEAST_LEN:
        return TextPlan(read)
    longest = min(SELF_LEN, limit)
    read = cut(longest)
    return TextPlan(read, *_own_shape(n_token - sum(map(len, read)), longest, numbers))


def _own_shape(tokens: int, longest: int, numbers: int) -> tuple[int, int, int]:
    """Sequences side by side, tokens per sequence and rounds for text that the model writes."""
    room = KV_BYTES // (F16 * numbers * padded_ctx(longest))
    # never one alone: attention of a single query is split over the threads, so its rounding depends on them
    n_seq = max(2, min(SELF_SEQS, tokens // LEAST_LEN, room))
    n_round = -(-tokens // (n_seq * longest))
    return n_seq, tokens // (n_seq * n_round), n_round


def _read(engine: Engine, text: Sequence[int], seq: int, progress: Progress) -> None:
    for start in range(0, len(text), engine.n_batch):
        part = text[start : start + engine.n_batch]
        engine.decode(part, [seq] * len(part), list(range(start, start + len(part))), outputs=False)
        progress(len(part))


def _run_texts(
    engine: Engine, capture: Capture, texts: Sequence[Sequence[int]], n_seq: int, progress: Progress
) -> None:
    for first in range(0, len(texts), n_seq):
        for seq, text in enumerate(texts[first : first + n_seq]):
            _read(engine, text, seq, progress)
            capture.add(seq)
        engine.clear()


def _write_texts(engine: Engine, capture: Capture, plan: TextPlan, seed: int, progress: Progress) -> list[list[int]]:
    texts: list[list[int]] = []
    for i in range(plan.n_round):
        texts += write_text(engine, plan.n_seq, plan.n_len, np.random.default_rng([seed, i]), progress)
        for seq in range(plan.n_seq):
            capture.add(seq)
        engine.clear()
    return texts


def is_finite(sums: Sums) -> bool:
    """Whether all sums are numbers."""
    return bool(np.isfinite(sums.total).all() and np.isfinite(sums.gram).all())


def _not_finite(groups: LayerGroups, group: int, sums: Mapping[Kind, Sums]) -> str:
    """What is wrong with sums that are not finite: the first layer of the group that shows it."""
    for i, layer in enumerate(groups.layers[group]):
        for kind in groups.kinds(group):
            sizes = groups.sizes(group, kind)
            own = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
            if not (np.isfinite(sums[kind].total[own]).all() and np.isfinite(sums[kind].gram[own, own]).all()):
                return (
                    f"{kind.upper()} of layer {layer}: the captured sums are not finite; the model computes NaN or "
                    "infinity there, and calibration needs finite numbers: use another file of this model"
                )
    return f"layers {groups.name(group)}: the captured sums are not finite; the model computes NaN or infinity"


def collect(
    engine: Engine,
    groups: LayerGroups,
    settings: Settings,
    frame: int,
    plan: TextPlan,
    progress: Progress,
    use: Callable[[int, Kind, Sums], object],
) -> TextInfo:
    """Run the calibration text and hand over the sums over it, one kind of one group at a time.

    Where the sums of all groups are too large together, the text is run several times, for some groups each.

    Parameters
    ----------
    engine : Engine
    groups : LayerGroups
    settings : Settings
    frame : int
        Tokens per chunk.
    plan : TextPlan
    progress : callable
        Gets the number of tokens after each batch; each run over the text counts.
    use : callable
        Gets group, kind and sums.

    Returns
    -------
    TextInfo

    Raises
    ------
    CalibrationError
        The model fails on the text, or computes NaN or infinity; the text names the first layer that does.
    """
    written: list[list[int]] | None = None
    n_tokens = 0
    for run in split_runs(groups):
        engine.open_context(plan.n_seq, plan.longest)
        part = slice(run.start, run.stop)
        dims: dict[Kind, list[int]] = {kind: groups.dims[kind][part] for kind in KINDS}
        with Capture(engine, groups.layers[part], dims, frame, settings.n_sink) as capture:
            _run_texts(engine, capture, plan.read, plan.n_seq, progress)
            if written is None:
                written = _write_texts(engine, capture, plan, settings.seed, progress)
            else:
                _run_texts(engine, capture, written, plan.n_seq, progress)
            engine.close_context()
            for i, g in enumerate(run):
                for kind in groups.kinds(g):
                    sums = capture.read(i, kind)
                    if not is_finite(sums):
                        raise CalibrationError(_not_finite(groups, g, {k: capture.read(i, k) for k in groups.kinds(g)}))
                    capture.drop(i, kind)
                    n_tokens = sums.n_tokens
                    use(g, kind, sums)
    texts = [*plan.read, *map(tuple, written or ())]
    digest = hashlib.sha256(b"".join(np.asarray(text, dtype="<i4").tobytes() for text in texts))
    # of all kinds of text
    kept = tuple(texts[i * len(texts) // N_KEPT] for i in range(min(N_KEPT, len(texts))))
    return TextInfo(n_tokens, plan.longest, digest.hexdigest(), kept)
