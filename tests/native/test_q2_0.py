"""The dot product of q2_0 and q8_0 rows that we add to the CPU backend, against plain arithmetic."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from xkv_gguf.runtime import loader

loader.load()


def cpu_library() -> ctypes.CDLL:
    (path,) = loader.LIB_DIR.glob("libggml-cpu*")
    library = ctypes.CDLL(str(path))
    library.ggml_cpu_init()  # fills the table of f16 numbers
    return library


@pytest.mark.parametrize("n", [64, 128, 640, 4096])
def test_dot_product(n: int) -> None:
    rng = np.random.default_rng(n)
    codes = rng.integers(0, 4, n)
    scales2 = rng.normal(size=n // 64).astype(np.float16)
    values8 = rng.integers(-127, 128, n).astype(np.int8)
    scales8 = rng.uniform(0.001, 1, n // 32).astype(np.float16)

    row2 = b""
    for block, scale in zip(codes.reshape(-1, 16, 4), scales2, strict=True):
        packed = (block << np.array([0, 2, 4, 6])).sum(axis=1).astype(np.uint8)
        row2 += scale.tobytes() + packed.tobytes()
    row8 = b"".join(s.tobytes() + v.tobytes() for s, v in zip(scales8, values8.reshape(-1, 32), strict=True))

    x = (codes - 1.0) * np.repeat(scales2.astype(np.float64), 64)
    y = values8 * np.repeat(scales8.astype(np.float64), 32)
    found = ctypes.c_float()
    size = ctypes.c_size_t(0)
    cpu_library().ggml_vec_dot_q2_0_q8_0(n, ctypes.byref(found), size, row2, size, row8, size, 1)
    assert found.value == pytest.approx(float(x @ y), abs=1e-5 * float(np.abs(x) @ np.abs(y)))
