"""What the sequences of a context hold by rights: the model that both caches are compared with."""

from __future__ import annotations

import sys
from collections.abc import Sequence

END = sys.maxsize


class Held:
    """Of each sequence, the positions of its tokens by their numbers; a token that sequences share has one number.

    Several tokens have one position where positions were divided.
    """

    def __init__(self, n_seq: int, n_stream: int) -> None:
        self.seqs: list[dict[int, int]] = [{} for _ in range(n_seq)]
        self.n_stream = n_stream
        self.n_number = 0

    def stream(self, seq: int) -> int:
        return seq if self.n_stream > 1 else 0

    def peers(self, seq: int) -> list[int]:
        """Sequences in the stream of one, itself among them."""
        return [s for s in range(len(self.seqs)) if self.stream(s) == self.stream(seq)]

    def filled(self) -> list[int]:
        """Sequences that have tokens."""
        return [seq for seq, tokens in enumerate(self.seqs) if tokens]

    def first(self, seq: int) -> int:
        return min(self.seqs[seq].values(), default=-1)

    def last(self, seq: int) -> int:
        return max(self.seqs[seq].values(), default=-1)

    def n_used(self, stream: int) -> int:
        """Cells of a plain cache."""
        return len({n for seq, held in enumerate(self.seqs) if self.stream(seq) == stream for n in held})

    def number(self) -> int:
        """Of a new token."""
        self.n_number += 1
        return self.n_number - 1

    def remove(self, seq: int, p0: int, p1: int) -> None:
        self.seqs[seq] = {n: p for n, p in self.seqs[seq].items() if not p0 <= p < p1}

    def part(self, seq: int, p0: int, p1: int) -> dict[int, int]:
        return {n: p for n, p in self.seqs[seq].items() if p0 <= p < p1}

    def is_shared(self, seq: int, p0: int, p1: int = END) -> bool:
        """Whether other sequences have some of these tokens."""
        others = {n for s, held in enumerate(self.seqs) if s != seq for n in held}
        return not others.isdisjoint(self.part(seq, p0, p1))

    def renumbered(self, seqs: Sequence[dict[int, int]]) -> list[dict[int, int]]:
        """The same tokens as others of their own, as a saved state has them."""
        new: dict[int, int] = {}
        return [{new.setdefault(n, self.number()): p for n, p in held.items()} for held in seqs]
