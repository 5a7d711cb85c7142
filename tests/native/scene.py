"""Write a tiny model and a sidecar of random rotations into a folder, for `make test-faults` and others."""

from __future__ import annotations

import sys
from pathlib import Path

from .sidecars import write_random
from .tiny_models import MODELS, N_LAYER, write_model


def main(folder: Path) -> None:
    """Write both."""
    kind = MODELS["llama"]
    write_model("llama", folder / "model.gguf")
    write_random(folder / "model.xkv.gguf", N_LAYER, (kind.embd_k, kind.embd_v), 4, 32)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
