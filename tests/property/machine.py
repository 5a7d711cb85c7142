"""Random operations on a pair of contexts, as a state machine of hypothesis's, which makes failures small."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from .held import END
from .options import FAMILIES, Options, normal, shortlist
from .rig import rig

SEQ = st.integers(0, 3)
"""A sequence: its number modulo how many there are."""
PLACE = st.integers(0, 255)
"""A position: a share of those that a sequence has, in 256th."""

MOST_SAVED = 3

EMPTY_OVER_OTHERS = True
"""Whether a stream without tokens is copied to one that has some."""
PARTS_OF_WINDOWED = False
"""Whether parts of sequences are copied between streams of windowed layers."""


def any_options(family: str) -> st.SearchStrategy[Options]:
    """All combinations."""
    return st.builds(
        Options,
        model=st.sampled_from(FAMILIES[family]),
        n_ubatch=st.sampled_from((64, 32, 16, 7, 1)),
        n_seq_max=st.integers(1, 4),
        unified=st.booleans(),
        fused=st.booleans(),
        many=st.booleans(),
        online=st.booleans(),
        staged=st.booleans(),
        n_window=st.sampled_from((8, 40)),
        n_text_sink=st.sampled_from((0, 8)),
        swa_full=st.booleans(),
        n_rs_seq=st.sampled_from((0, 8)),
    ).map(normal)


class Machine(RuleBasedStateMachine):
    """Arguments are read modulo what there is, so that every sequence of steps is a valid one."""

    options: st.SearchStrategy[Options]

    def __init__(self) -> None:
        super().__init__()
        self.pair: Any = None

    def start(self, given: Options) -> None:
        self.pair = rig().pair(given)
        self.n_seq = given.n_seq_max
        self.hybrid = given.family == "hybrid"

    def teardown(self) -> None:
        """What the last step left goes on."""
        if not self.pair:
            return
        try:
            if not self.pair.apart:
                self.pair.decode([((seq,), 2) for seq in range(self.n_seq)], mixed=True)
        finally:
            if self.pair.apart:
                rig().drop(self.pair.given)

    def place(self, seq: int, at: int) -> int:
        """A position among those of a sequence, or the next one."""
        first, last = self.pair.held.first(seq), self.pair.held.last(seq)
        return 0 if last < 0 else first + at * (last + 1 - first) // 255

    def span(self, seq: int, a: int, b: int) -> tuple[int, int]:
        p0, p1 = sorted((self.place(seq, a), self.place(seq, b)))
        return p0, p1

    # batches

    @rule(seq=SEQ, n=st.integers(41, 200))
    def prompt(self, seq: int, n: int) -> None:
        self.pair.decode([((seq % self.n_seq,), n)])

    @rule(
        parts=st.lists(st.tuples(SEQ, st.integers(1, 40)), min_size=1, max_size=4),
        first=st.sampled_from((0, 0, 0, 50)),
        mixed=st.booleans(),
    )
    def decode(self, parts: list[tuple[int, int]], first: int, mixed: bool) -> None:
        lengths = {seq % self.n_seq: n for seq, n in parts}
        self.pair.decode([((seq,), n) for seq, n in lengths.items()], 0 if self.hybrid else first, mixed)

    @rule(n=st.integers(1, 12))
    def step(self, n: int) -> None:
        """Single tokens of all sequences that have some."""
        for _ in range(n):
            parts = [((seq,), 1) for seq in self.pair.held.filled()]
            if not parts or not self.pair.decode(parts):
                return

    @precondition(lambda self: self.pair.given.unified and self.n_seq > 1 and not self.hybrid)
    @rule(seq=SEQ, n=st.integers(1, 40))
    def decode_together(self, seq: int, n: int) -> None:
        """The same tokens for all sequences that hold what one does."""
        held = self.pair.held.seqs
        same = tuple(s for s in range(self.n_seq) if held[s] == held[seq % self.n_seq])
        self.pair.decode([(same, n)])

    @rule(seq=SEQ, n=st.integers(1, 8), keep=st.integers(0, 7))
    def draft(self, seq: int, n: int, keep: int) -> None:
        """Tokens some of which turn out wrong."""
        seq %= self.n_seq
        if self.pair.decode([((seq,), n)]):
            self.pair.remove(seq, self.pair.held.last(seq) + 1 - n + keep % n, -1)

    # sequences

    @rule(seq=SEQ, at=PLACE)
    def cut(self, seq: int, at: int) -> None:
        seq %= self.n_seq
        self.pair.remove(seq, self.place(seq, at), -1)

    @rule(seq=SEQ, a=PLACE, b=PLACE)
    def cut_out(self, seq: int, a: int, b: int) -> None:
        seq %= self.n_seq
        p0, p1 = self.span(seq, a, b)
        if p0 < p1:
            self.pair.remove(seq, p0, p1)

    @rule(seq=SEQ, at=PLACE)
    def cut_front(self, seq: int, at: int) -> None:
        seq %= self.n_seq
        if self.place(seq, at) > 0:
            self.pair.remove(seq, -1, self.place(seq, at))

    @rule(seq=SEQ, what=st.sampled_from(("one", "all", "clear", "clear data")))
    def remove(self, seq: int, what: str) -> None:
        """Whole sequences."""
        seq %= self.n_seq
        if what in ("one", "all"):
            self.pair.remove(seq if what == "one" else -1, -1, -1)
        else:
            self.pair.clear(what == "clear data")

    @precondition(lambda self: len(self.pair.held.filled()) > 0)
    @rule(seq=SEQ)
    def keep(self, seq: int) -> None:
        """One sequence alone."""
        self.pair.keep(seq % self.n_seq)

    @precondition(lambda self: self.n_seq > 1 and not self.hybrid)
    @rule(seq=SEQ, a=PLACE, b=PLACE)
    def cut_all(self, seq: int, a: int, b: int) -> None:
        p0, p1 = self.span(seq % self.n_seq, a, b)
        if p0 < p1:
            self.pair.remove(-1, p0, p1)

    @precondition(lambda self: self.n_seq > 1)
    @rule(src=SEQ, to=st.integers(1, 3), empty=st.booleans())
    def copy(self, src: int, to: int, empty: bool) -> None:
        src %= self.n_seq
        dst = (src + 1 + (to - 1) % (self.n_seq - 1)) % self.n_seq
        # a recurrent state takes the place of another one
        empty = empty or self.hybrid or not self.pair.can_copy(src, dst, 0, END)
        # of nothing, which between streams is refused as if it were a part
        empty = empty or (not EMPTY_OVER_OTHERS and not self.pair.held.seqs[src])
        if not empty or self.pair.remove(dst, -1, -1):
            self.pair.copy(src, dst)

    @precondition(lambda self: self.n_seq > 1 and not self.hybrid and (PARTS_OF_WINDOWED or self.in_one_cache()))
    @rule(src=SEQ, to=st.integers(1, 3), a=PLACE, b=PLACE, empty=st.booleans())
    def copy_part(self, src: int, to: int, a: int, b: int, empty: bool) -> None:
        src %= self.n_seq
        dst = (src + 1 + (to - 1) % (self.n_seq - 1)) % self.n_seq
        forgotten = self.pair.windowed and self.pair.first_looked_at(src) > self.pair.held.first(src)
        p0, p1 = self.span(src, a, 255 if forgotten else b)
        # a stream takes a part while it is empty
        empty = empty or not self.pair.given.unified or not self.pair.can_copy(src, dst, p0, p1)
        if p0 < p1 and (not empty or self.pair.remove(dst, -1, -1)):
            self.pair.copy(src, dst, p0, p1)

    def has_its_own_positions(self) -> bool:
        """Whether a shift moves one sequence alone: copies share a cell of a recurrent state, and its position."""
        return self.pair.can_shift() and not (self.hybrid and self.n_seq > 1)

    def in_one_cache(self) -> bool:
        """Without copies between streams of windowed layers."""
        return self.pair.given.unified or not self.pair.windowed

    @precondition(lambda self: self.has_its_own_positions())
    @rule(seq=SEQ, a=PLACE, b=PLACE)
    def slide(self, seq: int, a: int, b: int) -> None:
        """Remove a part and move what follows to its place."""
        seq %= self.n_seq
        p0, p1 = self.span(seq, a, b)
        if p0 < p1 and not self.pair.held.is_shared(seq, p1) and self.pair.remove(seq, p0, p1):
            self.pair.shift(seq, p1, -1, p0 - p1)

    @precondition(lambda self: self.has_its_own_positions())
    @rule(seq=SEQ, at=PLACE, by=st.integers(1, 60))
    def make_a_gap(self, seq: int, at: int, by: int) -> None:
        seq %= self.n_seq
        p0 = self.place(seq, at)
        if not self.pair.held.is_shared(seq, p0):
            self.pair.shift(seq, p0, -1, by)

    # the shifts in place of it let a plain cache forget early what windowed layers do not see
    @precondition(lambda self: self.pair.can_shift() and not self.pair.windowed)
    @rule(seq=SEQ, a=PLACE, b=PLACE, d=st.integers(2, 4))
    def divide(self, seq: int, a: int, b: int, d: int) -> None:
        """Several tokens have one position afterwards, as with self-extend."""
        seq %= self.n_seq
        p0, p1 = self.span(seq, a, b)
        if p0 < p1 and not self.pair.held.is_shared(seq, p0, p1):
            self.pair.divide(seq, p0, p1, d)

    # states

    @precondition(lambda self: len(self.pair.saved) < MOST_SAVED)
    @rule(seq=SEQ, whole=st.booleans())
    def save(self, seq: int, whole: bool) -> None:
        self.pair.save(None if whole else seq % self.n_seq)

    @rule(seq=SEQ, to=SEQ, n=st.integers(1, 40), whole=st.booleans())
    def go_back(self, seq: int, to: int, n: int, whole: bool) -> None:
        """To a state of before some tokens."""
        seq, to = seq % self.n_seq, to % self.n_seq
        self.pair.save(None if whole else seq)
        if self.pair.decode([((seq,), n)]) and self.pair.saved:
            self.pair.load(self.pair.saved[-1], to)
        del self.pair.saved[MOST_SAVED:]

    @precondition(lambda self: self.pair.saved)
    @rule(which=st.integers(0, MOST_SAVED - 1), seq=SEQ)
    def load(self, which: int, seq: int) -> None:
        self.pair.load(self.pair.saved[which % len(self.pair.saved)], seq % self.n_seq)


def machine(family: str, few: bool) -> type[Machine]:
    """Of a family, over few options or all."""
    options = st.sampled_from(list(shortlist(family))) if few else any_options(family)

    class Of(Machine):
        @initialize(given=options, n=st.integers(0, 200))
        def open(self, given: Options, n: int) -> None:
            self.start(given)
            if n > 0:
                self.pair.decode([((0,), n)])

    Of.__name__ = Of.__qualname__ = family.capitalize()
    return Of
