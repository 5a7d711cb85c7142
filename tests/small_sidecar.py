"""A small sidecar made of numpy arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from xkv_gguf.plan.size_target import SizeTarget
from xkv_gguf.sidecar.info import Calibration, Group, SidecarInfo, tensor_name

Arrays = dict[str, npt.NDArray[Any]]


def small_info(**changes: Any) -> SidecarInfo:
    """Three layers in two groups: K dimensions 48 and 24, V dimensions 32 and 16."""
    info = SidecarInfo(
        fingerprint="ab" * 32,
        architecture="llama",
        name="tiny",
        embd_k=(24, 24, 24),
        embd_v=(16, 16, 16),
        group_size=2,
        frame=32,
        n_sink=4,
        groups=(Group((0, 1), 1.5, 0.25), Group((2,), 1.0, 2.0)),
        calibration=Calibration("self", 1000, 7, 128, "cd" * 32),
        settings={"tokens": 1000, "data": []},
        target=SizeTarget("ratio", "6.5"),
        n_ctx=4096,
        kld_scale=0.125,
        scale_k=(1.0, 0.5, 2.0),
        scale_v=(0.25, 1.0, 4.0),
    )
    return dataclasses.replace(info, **changes)


def small_arrays(info: SidecarInfo) -> Arrays:
    """Arrays that need no library function: signed permutations, ramps and powers of two.

    Of K of the first group, two thirds of the directions are held, of the others all.
    """
    arrays: Arrays = {}
    for g in range(len(info.groups)):
        for kind in info.kinds(g):
            dim = info.dim(g, kind)
            basis = np.eye(dim, dtype=np.float16)[::-1].copy()
            basis[1::2] *= -1
            arrays[tensor_name(g, kind, "basis")] = basis[: dim * 2 // 3] if (g, kind) == (0, "k") else basis
            arrays[tensor_name(g, kind, "mean")] = np.arange(dim, dtype=np.float32) / 8
            arrays[tensor_name(g, kind, "spectrum")] = np.exp2(-np.arange(dim, dtype=np.float32) / 4)
    return arrays
