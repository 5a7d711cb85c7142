"""Small sidecars and models made of numpy arrays."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter

from xkv_gguf.convert.knob import Knob
from xkv_gguf.convert.plan import KINDS
from xkv_gguf.convert.sidecar import DIGEST_AT
from xkv_gguf.convert.sidecar_info import Calibration, Group, SidecarInfo, tensor_name
from xkv_gguf.convert.sidecar_write import write_sidecar

from .tiny import weights, write_tiny

Arrays = dict[str, npt.NDArray[Any]]
GOLDEN = Path(__file__).parent / "data" / "golden-v3.sidecar"


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
        groups=(Group(0, 2, 1.5, 0.25), Group(2, 1, 1.0, 2.0)),
        calibration=Calibration("self", 1000, 7, 128, "cd" * 32),
        settings={"tokens": 1000, "data": []},
        knob=Knob("ratio", "6.5"),
        n_ctx=4096,
        kld_scale=0.125,
        scale_k=(1.0, 0.5, 2.0),
        scale_v=(0.25, 1.0, 4.0),
    )
    return dataclasses.replace(info, **changes)


def small_arrays(info: SidecarInfo) -> Arrays:
    """Arrays that need no library function: signed permutations, ramps and powers of two."""
    arrays: Arrays = {}
    for g in range(len(info.groups)):
        for kind in KINDS:
            dim = info.dim(g, kind)
            basis = np.eye(dim, dtype=np.float16)[::-1].copy()
            basis[1::2] *= -1
            arrays[tensor_name(g, kind, "basis")] = basis
            arrays[tensor_name(g, kind, "mean")] = np.arange(dim, dtype=np.float32) / 8
            arrays[tensor_name(g, kind, "spectrum")] = np.exp2(-np.arange(dim, dtype=np.float32) / 4)
    return arrays


@pytest.fixture
def sidecar_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.xkv.gguf"
    info = small_info()
    write_sidecar(path, info, small_arrays(info))
    return path


@pytest.fixture
def reseal() -> Callable[[Path, bytes], None]:
    """Write bytes to a file with a digest that matches them: what only a malicious or broken writer makes."""

    def write(path: Path, data: bytes) -> None:
        zeroed = data[:DIGEST_AT] + b"0" * 64 + data[DIGEST_AT + 64 :]
        digest = hashlib.sha256(zeroed).hexdigest().encode()
        path.write_bytes(zeroed[:DIGEST_AT] + digest + zeroed[DIGEST_AT + 64 :])

    return write


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a GGUF file that has a model's metadata and a few tensors, but cannot run."""

    def write(name: str = "model.gguf", seed: int = 0, title: str = "toy") -> Path:
        path = tmp_path / name
        writer = GGUFWriter(path, "llama")
        writer.add_name(title)
        writer.add_block_count(2)
        writer.add_embedding_length(64)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
        rng = np.random.default_rng(seed)
        for layer in (1, 0):
            writer.add_tensor(f"blk.{layer}.attn_k.weight", rng.standard_normal((64, 64)).astype(np.float32))
        writer.add_tensor("token_embd.weight", rng.standard_normal((3, 64)).astype(np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def tiny_weights() -> Arrays:
    return weights(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Arrays) -> Path:
    """A llama model of three layers that runs: K and V have 64 numbers per token and layer."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path, tiny_weights)
    return path


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """About 4000 tokens for the tiny model."""
    rng = np.random.default_rng(6)
    words = ["rain", "stone", "if (x > 0)", "river", "return", "seven", "- item", "\n", "The"]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choice(words, 700)))
    return path
