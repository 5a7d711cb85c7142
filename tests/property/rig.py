"""Models of all families and the pairs of contexts that are open: opening one costs more than what is done with it."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xkv_gguf.plan.stages import Stage
from xkv_gguf.runtime import native

from ..archs.conftest import run_program
from ..archs.test_archs import loaded
from ..native.harness import close_model, open_context, open_model
from ..native.sidecars import Bases, write_random
from ..native.tiny_models import MODELS, N_LAYER, write_model
from .options import Options
from .pair import Pair, Tally

ROOT = Path(__file__).resolve().parents[2]
FRAME = 32
MOST_OPEN = 12
"""Pairs."""
MOST_USES = 40
"""Of a pair, before it is opened anew."""


@dataclass
class Use:
    pair: Pair
    stack: ExitStack
    n: int = 0


def cache_params(bases: Bases, given: Options) -> native.ScopeParams:
    """Every direction in f32, in every stage."""
    params = bases.params(
        n_absorb=8 if given.many else 64,
        n_text_sink=given.n_text_sink,
        online=given.online,
        fused=given.fused,
    )
    stages = (Stage(256, type="f32"),) if given.staged else ()
    return replace(params, n_window=given.n_window, stages=stages)


class Rig:
    """Opens pairs of contexts when they are asked for, a plain one and one of xkv."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.tally = Tally()
        self.models: dict[str, tuple[Any, Bases]] = {}
        self.uses: OrderedDict[Options, Use] = OrderedDict()

    def model(self, name: str) -> tuple[Any, Bases]:
        if name not in self.models:
            self.models[name] = self._tiny(name) if name in MODELS else self._arch(name)
        return self.models[name]

    def _tiny(self, name: str) -> tuple[Any, Bases]:
        path = self.folder / f"{name}.gguf"
        write_model(name, path)
        model = open_model(path)
        self.stack.callback(close_model, model)
        kind = MODELS[name]
        return model, write_random(path.with_suffix(".xkv.gguf"), N_LAYER, (kind.embd_k, kind.embd_v), 2, FRAME)

    def _arch(self, name: str) -> tuple[Any, Bases]:
        run_program(ROOT, self.folder, name.removesuffix("-moe"), name)
        one = self.stack.enter_context(loaded(self.folder / f"{name}.gguf"))
        return one.model, one.bases

    def pair(self, given: Options) -> Pair:
        """Both empty."""
        use = self.uses.pop(given, None)
        if use and use.n >= MOST_USES:
            use.stack.close()
            use = None
        while not use and len(self.uses) >= MOST_OPEN:
            self.uses.popitem(last=False)[1].stack.close()
        use = use or self._open(given)
        use.n += 1
        self.uses[given] = use
        use.pair.begin()
        return use.pair

    def _open(self, given: Options) -> Use:
        model, bases = self.model(given.model)
        stack = ExitStack()
        shape: dict[str, Any] = {
            "n_ctx": given.n_ctx,
            "n_ubatch": given.n_ubatch,
            "n_seq_max": given.n_seq_max,
            "unified": given.unified,
            "swa_full": given.swa_full,
            "n_rs_seq": given.n_rs_seq,
        }
        plain = stack.enter_context(open_context(model, flash_attn=given.family == "windowed", **shape))
        xkv = stack.enter_context(open_context(model, xkv=cache_params(bases, given), **shape))
        return Use(Pair(plain, xkv, given, self.tally), stack)

    def drop(self, given: Options) -> None:
        """Close a pair that went apart, so that the next one begins anew."""
        use = self.uses.pop(given, None)
        if use:
            use.stack.close()

    def close(self) -> None:
        for given in list(self.uses):
            self.drop(given)
        self.stack.close()


_open: list[Rig] = []


def rig() -> Rig:
    """The one of this process."""
    if not _open:
        _open.append(Rig())
    return _open[0]


def close_rig() -> None:
    while _open:
        _open.pop().close()
