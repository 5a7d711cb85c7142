"""Tests that llama-cpp-python's sdist brings, with `xkv_gguf.Llama` in place of theirs and the demo model."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import llama_cpp
import pytest

from xkv_gguf import Llama

from .conftest import SMALL

pytestmark = pytest.mark.model

FILE = "tests/test_llama.py"
VOCAB = "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"
OF_A_TRANSFORMER = (
    "test_exact_cached_prompt_reuse_matches_fresh",
    "test_loaded_exact_cached_prompt_reuse_matches_fresh",
    "test_ram_cache_exact_prompt_hit_matches_fresh",
    "test_shorter_prompt_prefix_reuse_matches_fresh",
)
"""Tests with any model; the others want the very words of Qwen3.5, embeddings or a recurrent model."""


def stub(name: str, attribute: str, patch: pytest.MonkeyPatch) -> None:
    """A module that the file imports from; what it would be is not called."""
    module = ModuleType(name)
    setattr(module, attribute, None)
    patch.setitem(sys.modules, name, module)


@pytest.fixture
def upstream(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file of the sdist that the build has fetched."""
    archives = list((repo_root / ".cache").glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        pytest.skip("the sdist of llama-cpp-python is not in .cache: make build")
    with tarfile.open(archives[0]) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if name in (FILE, VOCAB):
                content = archive.extractfile(member)
                assert content is not None
                (tmp_path / Path(name).name).write_bytes(content.read())
    stub("scipy", "special", monkeypatch)
    stub("scipy.special", "log_softmax", monkeypatch)
    stub("huggingface_hub", "hf_hub_download", monkeypatch)
    spec = importlib.util.spec_from_file_location("upstream_test_llama", tmp_path / Path(FILE).name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MODEL", str(tmp_path / Path(VOCAB).name))
    return module


@pytest.fixture(params=["xkv", "f16"])
def mode(request: pytest.FixtureRequest, sidecar: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache; a context that is smaller than an xkv cache can be is opened larger."""

    def ours(model_path: str, **kwargs: Any) -> Llama:
        if kwargs.get("vocab_only"):
            return Llama(model_path, kv_mode="f16", **kwargs)
        kwargs |= {"n_threads": 1, "n_threads_batch": 1, "kv_mode": request.param}
        if request.param == "xkv":
            kwargs["xkv"] = {"sidecar": str(sidecar), **SMALL}
        return Llama(model_path, **kwargs)

    monkeypatch.setattr(llama_cpp, "Llama", ours)
    return str(request.param)


def test_tokenization(mode: str, upstream: ModuleType) -> None:
    upstream.test_llama_cpp_tokenization()


@pytest.mark.parametrize("name", OF_A_TRANSFORMER)
def test_prompts_in_the_cache(name: str, mode: str, upstream: ModuleType, demo_model: Path) -> None:
    run: Callable[..., None] = getattr(upstream, name)

    class Request:
        @staticmethod
        def getfixturevalue(fixture: str) -> str:
            assert fixture == "llama_cpp_transformer_model_path"
            return str(demo_model)

    run(Request, "llama_cpp_transformer_model_path", False, False)


def test_an_edited_prompt(mode: str, upstream: ModuleType, demo_model: Path) -> None:
    upstream._assert_prompt_cache_reset_handles_history_edit(str(demo_model), is_recurrent=False, is_hybrid=False)
