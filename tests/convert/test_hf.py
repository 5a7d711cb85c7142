from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf.cli import main
from xkv_gguf.convert import hf
from xkv_gguf.errors import ModelError, OptionError
from xkv_gguf.model.fingerprint import read_model_header
from xkv_gguf.model.gguf_read import type_name
from xkv_gguf.sidecar.read import read_sidecar

HAVE_EXTRA = all(importlib.util.find_spec(name) is not None for name in (*hf.NEEDED, "tokenizers"))
needs_extra = pytest.mark.skipif(not HAVE_EXTRA, reason="the extra hf (transformers, safetensors) is not installed")


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama model with random weights and a tokenizer of bytes, as transformers saves it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf") / "toy"
    # upstream recognizes byte-level tokenizers by hashes, but takes any that falls back to bytes
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@needs_extra
@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_folder_to_gguf_to_sidecar(
    hf_folder: Path, tmp_path: Path, outtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "toy.xkv.gguf"
    options = ["--outtype", outtype, "--tokens", "512", "--threads", "1", "--quiet"]
    status = main(["convert", str(hf_folder), "-o", str(out), *options])
    assert status == 0, capsys.readouterr().err
    model = tmp_path / "toy.gguf"
    header = read_model_header(model)
    assert header.scalar("general.architecture") == "llama"
    assert type_name(header.tensors["blk.0.attn_k.weight"].type) == outtype.upper()
    read_sidecar(out).check_model(model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.gguf", "toy.xkv.gguf"]


@needs_extra
def test_unknown_architecture(hf_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for path in hf_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["OddForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"OddForCausalLM.*not supported") as err:
        hf.convert_folder(folder, tmp_path / "odd.gguf", "f16")
    assert "\n" not in str(err.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd"]


def test_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path)]) == 1
    assert "has no config.json; a GGUF file or a Hugging Face folder is expected" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no safetensors files"):
        hf.check_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="has no tokenizer"):
        hf.check_folder(tmp_path)


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(hf, "NEEDED", ("no_such_package_here",))
    with pytest.raises(ModelError, match=r"needs the package no_such_package_here .*`pip install xkv-gguf\[hf\]`"):
        hf.check_folder(tmp_path)


def test_failures_of_the_converter_become_one_line() -> None:
    log = "Traceback (most recent call last):\n  ...\nModuleNotFoundError: No module named 'sentencepiece.x'\n"
    assert hf.failure(log) == (
        "its conversion needs the package sentencepiece; `pip install xkv-gguf[hf]` brings what is usual"
    )
    assert hf.failure("INFO:hf-to-gguf:Loading\nERROR:hf-to-gguf:Model X is not supported\n").endswith(
        "failed: Model X is not supported"
    )
    assert hf.failure("a\n  KeyError: 'n_head'\n") == "llama.cpp's converter failed: KeyError: 'n_head'"
    assert hf.failure("") == "llama.cpp's converter failed: no reason given"


def test_where_the_gguf_goes(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    assert hf.gguf_path(folder, None, "f16") == folder / "toy-f16.gguf"
    assert hf.gguf_path(folder, Path("a/b.xkv.gguf"), "q8_0") == Path("a/b.gguf")
    with pytest.raises(OptionError, match=r"a name that ends in \.xkv\.gguf is expected"):
        hf.gguf_path(folder, Path("a/b.gguf"), "f16")


def test_unknown_file_type(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="file type 'q2_k': one of f16, q8_0 expected"):
        hf.convert_folder(tmp_path, tmp_path / "x.gguf", "q2_k")
