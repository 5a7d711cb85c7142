"""Two contexts that are driven alike, one with a plain cache and one of xkv, and compared after each step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from xkv_gguf.runtime import native

from ..native.harness import F32, Context, deviation, lib
from ..native.state import load as load
from ..native.state import save as save
from .held import END, Held
from .options import Options

TOLERANCE, TOLERANCE_FLASH = 1e-3, 0.15
"""Of a difference in a logit, as a share of the largest one: in f32, and where flash attention rounds to f16."""

LIMITS = {
    "rest of cut chunks": ("chunks that sequence ", " shares with others are cut at positions "),
    "parts of chunks": (" chunks of the store are needed for parts of chunks, and ",),
    "part of a chunk": ("no chunk of the store is free for a part of another; ",),
    "rest of copied chunks": ("the window of ", " tokens has no room for the rest of a cut chunk"),
    "chunks of a state": ("the state takes ", " chunks of ", " tokens, this cache has room for "),
}
"""What an xkv cache alone refuses, by the words that its text has in this order; anything else fails."""

FORGOTTEN = "windowed layers have forgotten"
FULL = "cells of tokens that were shared"
BOTH = "both"
STORED = "(with stored tokens)"

Part = tuple[tuple[int, ...], int]
"""Sequences that have the same tokens, and how many."""


@dataclass(frozen=True)
class Row:
    """A token of a batch."""

    number: int
    pos: int
    seqs: tuple[int, ...]


@dataclass(frozen=True)
class Snapshot:
    """A saved state of both, of a sequence or of all, and what it holds."""

    seq: int | None
    plain: bytes
    xkv: bytes
    held: list[dict[int, int]]
    """As `Held.seqs`."""


@dataclass
class Tally:
    """What was done, with any pair.

    Attributes
    ----------
    done : Counter
        Operations, by name; `STORED`: those that left tokens in the store.
    refusals : Counter
        Those that were refused, by kind: what xkv alone refuses, and `BOTH`.
    worst : float
        Largest deviation of logits, as a share of the tolerance.
    """

    done: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0


class Pair:
    """A plain cache and an xkv cache that hold the same tokens.

    Attributes
    ----------
    apart : bool
        They are not alike any more.
    """

    def __init__(self, plain: Context, xkv: Context, given: Options, tally: Tally) -> None:
        self.plain, self.xkv, self.given, self.tally = plain, xkv, given, tally
        self.windowed = given.family == "windowed"
        self.n_swa = lib.llama_model_n_swa(lib.llama_get_model(plain.ptr))
        rng = np.random.default_rng(1)
        self.tokens = rng.integers(0, min(plain.n_vocab, 128), 1 << 14).tolist()
        self.held = Held(given.n_seq_max, given.n_stream)
        self.saved: list[Snapshot] = []
        self.pending = False  # a copy that the plain cache makes at the next batch, cleared or not
        self.apart = False

    @property
    def tolerance(self) -> float:
        """Windowed layers always have flash attention, over f32."""
        return (5 * TOLERANCE if self.windowed else TOLERANCE) if self.given.exact else TOLERANCE_FLASH

    @property
    def both(self) -> tuple[Context, Context]:
        return self.plain, self.xkv

    def begin(self) -> None:
        """Empty both, and forget what was saved."""
        self.saved.clear()
        self.clear(True)
        self.held = Held(self.given.n_seq_max, self.given.n_stream)

    # batches

    def decode(self, parts: Sequence[Part], first: int = 0, mixed: bool = False) -> bool:
        """Decode new tokens after those that the sequences have, from position `first` where they have none."""
        rows = self._rows(parts, first, mixed)
        n_ctx_seq = self.given.n_ctx // self.given.n_stream
        new = Counter(self.held.stream(row.seqs[0]) for row in rows)
        room = all(self.held.n_used(stream) + n <= n_ctx_seq for stream, n in new.items())
        code, found = self._run(self.xkv, rows)
        if code != 0 and room:
            self._undo(rows, code)
            return False
        plain_code, expected = self._run(self.plain, rows)
        text = f"llama_decode: xkv {code}, plain {plain_code}, expected {0 if room else 1}"
        self._expect(code == plain_code == (0 if room else 1), text)
        if code == 1:
            self.tally.refusals[BOTH] += 1
            return False
        for row in rows:
            for seq in row.seqs:
                self.held.seqs[seq][row.number] = row.pos
        self.pending = False
        self._compare(found, expected)
        self.check("decode")
        return True

    def _rows(self, parts: Sequence[Part], first: int, mixed: bool) -> list[Row]:
        rows = []
        for seqs, n in parts:
            last = self.held.last(seqs[0])
            start = first if last < 0 else last + 1
            rows.append([Row(self.held.number(), start + i, seqs) for i in range(n)])
        if not mixed:
            return [row for part in rows for row in part]
        longest = max(map(len, rows))
        return [part[i] for i in range(longest) for part in rows if i < len(part)]

    def _run(self, ctx: Context, rows: Sequence[Row]) -> tuple[int, F32]:
        batch = lib.llama_batch_init(len(rows), 0, self.given.n_seq_max)
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i] = self.tokens[row.number % len(self.tokens)]
            batch.pos[i] = row.pos
            batch.n_seq_id[i] = len(row.seqs)
            for j, seq in enumerate(row.seqs):
                batch.seq_id[i][j] = seq
            batch.logits[i] = 1
        code = lib.llama_decode(ctx.ptr, batch)
        lib.llama_batch_free(batch)
        if code != 0:
            return code, np.zeros((0, 0))
        logits = np.ctypeslib.as_array(lib.llama_get_logits(ctx.ptr), shape=(len(rows) * ctx.n_vocab,))
        return 0, logits.reshape(len(rows), ctx.n_vocab).copy()

    def _compare(self, found: F32, expected: F32) -> None:
        off = deviation(found, expected)
        self._expect(off <= self.tolerance, f"logits are off by {off:.2g}")
        self.tally.worst = max(self.tally.worst, off / self.tolerance)

    def _undo(self, rows: Sequence[Row], code: int) -> None:
        """Take back what xkv had decoded of a batch before it refused the rest."""
        if code == 1:
            self.tally.refusals[FULL] += 1
        else:
            self._count(native.take_refusal(self.xkv.ptr), "decode")
        for seq in {seq for row in rows for seq in row.seqs}:
            if not lib.llama_memory_seq_rm(self.xkv.memory, seq, min(r.pos for r in rows if seq in r.seqs), -1):
                self.recover()
                return
        self.check("decode")

    # operations on sequences

    def remove(self, seq: int, p0: int, p1: int) -> bool:
        """Remove positions of a sequence, or of all with -1; a bound below 0 is none."""
        seqs = list(range(self.given.n_seq_max)) if seq < 0 else [seq]
        if not lib.llama_memory_seq_rm(self.xkv.memory, seq, p0, p1):
            self._not_removed(seq, p0, p1)
            return False
        # a recurrent state of upstream's takes one sequence at a time
        for s in seqs if self.given.family == "hybrid" else [seq]:
            ok = lib.llama_memory_seq_rm(self.plain.memory, s, p0, p1)
            self._expect(ok, f"xkv alone removed {p0} to {p1} of sequence {seq}")
        for s in seqs:
            self.held.remove(s, max(p0, 0), p1 if p1 >= 0 else END)
        self.check("remove")
        return True

    def _not_removed(self, seq: int, p0: int, p1: int) -> None:
        refusal = native.take_refusal(self.xkv.ptr)
        if refusal:
            self._count(refusal, "remove")
            if str(refusal).endswith("; clear the cache"):
                self.recover()
        elif self.given.family == "hybrid":
            ok = lib.llama_memory_seq_rm(self.plain.memory, seq, p0, p1)
            self._expect(not ok, f"plain alone removed {p0} to {p1} of sequence {seq}")
            self.tally.refusals[BOTH] += 1
        else:
            seqs = self.held.filled() if seq < 0 else [seq]
            forgotten = any(self.first_looked_at(s) > max(0, p0 - self.n_swa + 1) for s in seqs)
            self._expect(forgotten, f"{p0} to {p1} of sequence {seq} were not removed, without a reason")
            self.tally.refusals[FORGOTTEN] += 1
        self.check("remove")

    def first_looked_at(self, seq: int) -> int:
        """The first position that windowed layers have not forgotten."""
        return int(lib.llama_memory_seq_pos_min(self.plain.memory, seq)) if self.windowed else 0

    def copy(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        """Share a sequence's tokens, or a part of them, with another one; between streams, in place of its tokens.

        A plain cache copies whole streams alone, so that the rest is removed from its copy.
        """
        apart = self.held.stream(src) != self.held.stream(dst)
        lib.llama_memory_seq_cp(self.xkv.memory, src, dst, p0, p1)
        lib.llama_memory_seq_cp(self.plain.memory, src, dst, *((-1, -1) if apart else (p0, p1)))
        if self._broke("copy"):
            return
        part = self.held.part(src, max(p0, 0), p1 if p1 >= 0 else END)
        if apart:
            for rest in ((0, max(p0, 0)), (p1, -1)):
                if rest[0] >= 0 and rest[0] != rest[1]:
                    lib.llama_memory_seq_rm(self.plain.memory, dst, *rest)
            self.pending = True
            self.held.seqs[dst] = self.held.renumbered([part])[0]
        else:
            self.held.seqs[dst].update(part)
        self.check("copy" if p0 < 0 and p1 < 0 else "copy of a part")

    def can_copy(self, src: int, dst: int, p0: int, p1: int) -> bool:
        """Whether no position of the target would have other tokens than before."""
        mine = self.held.seqs[dst]
        taken = set(mine.values())
        return all(n in mine or p not in taken for n, p in self.held.part(src, p0, p1).items())

    def keep(self, seq: int) -> None:
        """Keep a sequence alone; a plain cache leaves those of other streams, against what llama.h says."""
        for ctx in self.both:
            lib.llama_memory_seq_keep(ctx.memory, seq)
        if self._broke("keep"):
            return
        for other in set(range(self.given.n_seq_max)) - {seq}:
            lib.llama_memory_seq_rm(self.plain.memory, other, -1, -1)
            self.held.seqs[other].clear()
        self.check("keep")

    def clear(self, data: bool) -> None:
        for ctx in self.both:
            lib.llama_memory_clear(ctx.memory, data)
        for held in self.held.seqs:
            held.clear()
        self.check("clear")

    def can_shift(self) -> bool:
        return all(lib.llama_memory_can_shift(ctx.memory) for ctx in self.both)

    def shift(self, seq: int, p0: int, p1: int, by: int) -> None:
        """Move positions, to places that are free."""
        for ctx in self.both:
            lib.llama_memory_seq_add(ctx.memory, seq, p0, p1, by)
        self._move("shift", seq, p0, p1, lambda p: p + by)

    def divide(self, seq: int, p0: int, p1: int, d: int) -> None:
        """Positions over d: llama.cpp's own turns K the wrong way, so that a plain cache is shifted token by token."""
        lib.llama_memory_seq_div(self.xkv.memory, seq, p0, p1, d)
        for p in range(p0, p1):
            lib.llama_memory_seq_add(self.plain.memory, seq, p, p + 1, p // d - p)
        self._move("divide", seq, p0, p1, lambda p: p // d)

    def _move(self, what: str, seq: int, p0: int, p1: int, to: Callable[[int], int]) -> None:
        """Of what both did, the model's part."""
        if self._broke(what):
            return
        moved = self.held.part(seq, max(p0, 0), p1 if p1 >= 0 else END)
        self.held.seqs[seq].update((n, to(p)) for n, p in moved.items())
        self.pending = True
        self.check(what)

    # saved states

    def save(self, seq: int | None) -> None:
        """Of one sequence, or of all."""
        if not self._settle():
            return
        held = self.held.seqs if seq is None else [self.held.seqs[seq]]
        self.saved.append(Snapshot(seq, save(self.plain, seq), save(self.xkv, seq), [dict(one) for one in held]))
        self.check("save")

    def load(self, one: Snapshot, seq: int) -> bool:
        """Load a state, one of a sequence into `seq`."""
        to = None if one.seq is None else seq
        if not self._settle() or not self._has_room(one, to):
            return False
        if not load(self.xkv, one.xkv, to):
            self._count(native.last_error(), "load")
            self.check("load")
            return False
        self._expect(load(self.plain, one.plain, to), "plain refuses a state that xkv takes")
        new = self.held.renumbered(one.held)
        if to is None:
            self.held.seqs = new
        else:
            self.held.seqs[to] = new[0]
        self.check("load")
        return True

    def _has_room(self, one: Snapshot, to: int | None) -> bool:
        """Of a state that a plain cache can load; an empty one leaves what is there."""
        if to is None:
            return True
        rest = {n for s in self.held.peers(to) if s != to for n in self.held.seqs[s]}
        n_ctx_seq = self.given.n_ctx // self.given.n_stream
        return 0 < len(one.held[0]) <= n_ctx_seq - len(rest)

    def _settle(self) -> bool:
        """What a plain cache does at the next batch has to be done before a state is saved or loaded."""
        return not self.pending or any(self.decode([((seq,), 1)]) for seq in self.held.filled()[:1])

    # what is refused

    def _count(self, refusal: object, what: str) -> None:
        kind = next(
            (kind for kind, words in LIMITS.items() if re.search(".*".join(map(re.escape, words)), str(refusal))), None
        )
        self._expect(kind is not None, f"{what}: {refusal}")
        self.tally.refusals[str(kind)] += 1

    def _broke(self, what: str) -> bool:
        refusal = native.take_refusal(self.xkv.ptr)
        if not refusal:
            return False
        self._count(refusal, what)
        self.recover()
        return True

    def recover(self) -> None:
        """A broken cache says so, and can be used when it was cleared."""
        code, _ = self._run(self.xkv, [Row(0, self.held.last(0) + 1, (0,))])
        self._expect(code < 0 and native.last_error() != "", f"a broken cache decodes: {code}, {native.last_error()}")
        self.clear(False)
        self._expect(native.take_refusal(self.xkv.ptr) is None, "a cache is broken after it was cleared")

    def _expect(self, ok: bool, text: str) -> None:
        if not ok:
            self.apart = True
            raise AssertionError(text)

    def check(self, what: str) -> None:
        """Both hold the positions that they should."""
        self.tally.done[what] += 1
        for seq in range(self.given.n_seq_max):
            ends = [
                (lib.llama_memory_seq_pos_min(ctx.memory, seq), lib.llama_memory_seq_pos_max(ctx.memory, seq))
                for ctx in self.both
            ]
            n_exact, n_stored = native.seq_tokens(self.xkv.ptr, seq)
            self.tally.done[STORED] += n_stored > 0
            n_token, last, n_held = n_exact + n_stored, self.held.last(seq), len(self.held.seqs[seq])
            text = f"{what}: sequence {seq}: plain has positions {ends[0]}, xkv {ends[1]} and {n_token} tokens"
            self._expect(ends[0] == ends[1], text)
            self._expect((ends[1][1], n_token) == (last, n_held), f"{text}, expected {n_held} to {last}")
