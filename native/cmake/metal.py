"""Makes one text of kernels for Metal: quoted includes are replaced by the files, each once.

    python metal.py SOURCE OUT

ggml-metal compiles each of its kernel sources as one text, wherever it is embedded or copied to. A file whose text did
not change keeps its time stamp.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')


def flatten(source: Path, seen: set[Path] | None = None) -> str:
    """Text of a source and of what it includes by quoted names, as a preprocessor with `#pragma once` sees it."""
    seen = set() if seen is None else seen
    seen.add(source.resolve())
    found = []
    for line in source.read_text(encoding="utf-8").splitlines():
        if line.strip() == "#pragma once":
            continue
        if match := INCLUDE.match(line):
            included = source.parent / match[1]
            if included.resolve() not in seen:
                found.append(flatten(included, seen))
            continue
        found.append(line + "\n")
    return "".join(found)


def main() -> int:
    """Command line, called by CMake."""
    source, out = map(Path, sys.argv[1:])
    text = flatten(source)
    if not out.is_file() or out.read_text(encoding="utf-8") != text:
        out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
