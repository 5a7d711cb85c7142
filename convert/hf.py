"""From a Hugging Face folder to a GGUF file, by upstream's own converter from the pinned tree."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from xkv_gguf.base.files import check_writable, replacing
from xkv_gguf.errors import ModelError, OptionError
from xkv_gguf.runtime.loader import PACKAGE_DIR
from xkv_gguf.sidecar.info import SUFFIX

OUTTYPES = ("f16", "q8_0")
EXTRA = "pip install xkv-gguf[hf]"
# what every conversion needs; a tokenizer may need more, which the converter's own failure tells
NEEDED = ("transformers", "safetensors")


def gguf_path(folder: Path, out: Path | None, outtype: str) -> Path:
    """Where the GGUF of a folder goes: beside the sidecar `out`, or into the folder."""
    if out is None:
        return folder / f"{folder.resolve().name}-{outtype}.gguf"
    if not out.name.endswith(SUFFIX):
        raise OptionError(f"output {out}: a name that ends in {SUFFIX} is expected for a Hugging Face folder")
    return out.with_name(out.name[: -len(SUFFIX)] + ".gguf")


def check_folder(folder: Path) -> None:
    """Check that a folder holds a model before the converter is started.

    Raises
    ------
    ModelError
        A file is missing, or the extra is not installed.
    """
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "safetensors files")):
        if not any(folder.glob(pattern)):
            raise ModelError(f"model {folder}: has no {what}; a GGUF file or a Hugging Face folder is expected")
    if not any(any(folder.glob(p)) for p in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"model {folder}: has no tokenizer (tokenizer.json or tokenizer.model)")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"model {folder}: needs the package {missing[0]} to be converted; `{EXTRA}` brings it")


def convert_folder(folder: Path, target: Path, outtype: str) -> None:
    """Convert a Hugging Face folder to a GGUF file, which appears whole or not at all.

    Parameters
    ----------
    folder : Path
        Holds config.json, safetensors files and a tokenizer.
    target : Path
        The GGUF file; an old one is replaced.
    outtype : str
        "f16" or "q8_0".

    Raises
    ------
    ModelError
        The folder is no model, its architecture is unknown to the converter, or the extra is not installed.
    OptionError
        The file type is unknown, or the file cannot be written.
    """
    if outtype not in OUTTYPES:
        raise OptionError(f"file type {outtype!r}: one of {', '.join(OUTTYPES)} expected")
    check_folder(folder)
    check_writable(target)
    upstream = PACKAGE_DIR / "_upstream"
    script = upstream / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise ModelError(f"model {folder}: upstream's converter is not installed with this package; reinstall xkv-gguf")
    # the converter's own gguf-py, whatever version of gguf is installed
    env = {**os.environ, "PYTHONPATH": str(upstream / "gguf-py"), "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("NO_LOCAL_GGUF", None)
    with replacing(target) as temp:
        command = [sys.executable, str(script), str(folder), "--outfile", str(temp), "--outtype", outtype]
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if done.returncode != 0 or not temp.is_file():
            raise ModelError(f"model {folder}: {failure(done.stderr.decode('utf-8', 'replace'))}")


def failure(log: str) -> str:
    """One line that says why the converter failed."""
    missing = re.search(r"(?:ModuleNotFoundError|ImportError): No module named '([\w.]+)'", log)
    if missing:
        return f"its conversion needs the package {missing[1].partition('.')[0]}; `{EXTRA}` brings what is usual"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    unsupported = next((line for line in lines if "is not supported" in line), None)
    last = unsupported or (lines[-1] if lines else "no reason given")
    return "llama.cpp's converter failed: " + re.sub(r"^(ERROR:)?[\w.-]*:(?=[A-Z])", "", last)
