"""K and V scaled by layer: wide scales change nothing at full rank, impossible ones are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xkv_gguf.errors import SidecarError
from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import open_context
from .sidecars import write_random
from .test_full_rank import TOL_F32, TOL_FLASH, deviation, run_paths
from .tiny_models import MODELS, N_LAYER


def test_wide_scales_change_nothing(tiny: Callable[[str], Tiny], tokens: list[int], tmp_path: Path) -> None:
    one, kind = tiny("llama-gqa"), MODELS["llama-gqa"]
    bases = write_random(tmp_path / "s", N_LAYER, (kind.embd_k, kind.embd_v), 2, 32, widest=10.0)
    for scales in bases.scale.values():
        assert max(scales) / min(scales) > 5
    with open_context(one.model, flash_attn=False) as ctx:
        plain = run_paths(ctx, tokens)
    with open_context(one.model, exact=False) as ctx:
        flash = run_paths(ctx, tokens)
    with open_context(one.model, xkv=bases.params()) as ctx:
        xkv = run_paths(ctx, tokens)
    noise = max(deviation(flash[path], plain[path]) for path in plain)
    for path in plain:
        assert deviation(xkv[path], plain[path]) <= TOL_FLASH * noise + TOL_F32, path


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_impossible_scales(kind: str, value: float, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    shape = MODELS["llama"]
    bases = write_random(tmp_path / "s", N_LAYER, (shape.embd_k, shape.embd_v), 2, 32)
    good = bases.scale[kind]
    data = bases.path.read_bytes()
    old = struct.pack(f"<{N_LAYER}f", *good)
    assert data.count(old) == 1
    bases.path.write_bytes(data.replace(old, struct.pack(f"<{N_LAYER}f", good[0], value, *good[2:])))
    with (
        pytest.raises(SidecarError, match=rf"xkv\.scale_{kind} is \S+ for layer 1, expected a finite number above 0"),
        native.scope(bases.params()),
    ):
        pass
