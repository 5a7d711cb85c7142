"""What a pair of contexts is opened with: a family of models and the options of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

FAMILIES = {
    "gqa": ("llama-gqa", "llama-sinks"),
    "hybrid": ("lfm2", "qwen35"),
    "windowed": ("gemma3", "gpt-oss-moe"),
    "latents": ("deepseek2",),
}
"""Models by what beside plain attention they have."""


@dataclass(frozen=True)
class Options:
    """Of a pair of contexts.

    Attributes
    ----------
    many : bool
        Stock ops have flash attention for many queries, and rebuild K and V.
    staged : bool
        The store has a stage before the last one.
    """

    model: str = "llama-gqa"
    n_ubatch: int = 64
    n_seq_max: int = 1
    unified: bool = True
    fused: bool = True
    many: bool = False
    online: bool = False
    staged: bool = False
    n_window: int = 8
    n_text_sink: int = 0
    swa_full: bool = True
    n_rs_seq: int = 0

    @property
    def family(self) -> str:
        return next(family for family, names in FAMILIES.items() if self.model in names)

    @property
    def n_stream(self) -> int:
        return 1 if self.unified else self.n_seq_max

    @property
    def n_ctx(self) -> int:
        """Of all sequences. Windowed layers that forget hold 256 tokens, and so does the first stage."""
        return max(self.n_seq_max * (256 if self.swa_full else 512), 768 if self.staged else 0)

    @property
    def exact(self) -> bool:
        """Whether attention is in f32 all the way; flash attention rounds to f16."""
        return (self.fused and self.family != "latents") or (not self.many and self.n_stream == 1)


def normal(given: Options) -> Options:
    """The same, without options that mean nothing for its family."""
    given = replace(given, unified=given.unified or given.n_seq_max == 1)
    return replace(
        given,
        staged=given.staged and given.n_stream == 1,
        swa_full=given.swa_full or given.family != "windowed",
        # llama.cpp wants micro-batches that are longer
        n_rs_seq=given.n_rs_seq if given.family == "hybrid" and given.n_ubatch > 2 * given.n_rs_seq else 0,
    )


def shortlist(family: str) -> Iterator[Options]:
    """Few enough that their contexts stay open, each option with each of its values."""
    names = FAMILIES[family]
    rows = (
        (64, 1, True, True, False, False, False, 8, 0, True, 0),
        (7, 3, True, True, False, False, True, 8, 0, True, 0),
        (16, 4, False, True, False, True, False, 8, 0, False, 0),
        (1, 2, True, False, False, False, False, 40, 8, True, 0),
        (64, 2, False, False, True, True, False, 8, 0, True, 8),
        (32, 4, True, True, False, True, True, 8, 8, True, 0),
    )
    for i, row in enumerate(rows):
        yield normal(Options(names[i % len(names)], *row))
