"""What the tests of `eval` share: a text."""

from __future__ import annotations

from pathlib import Path

import pytest

from xkv_gguf.lab.haystack import paragraphs


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Some 2000 tokens of prose."""
    parts, size = [], 0
    for paragraph in paragraphs(1):
        parts.append(paragraph)
        size += len(paragraph)
        if size > 10_000:
            break
    path = tmp_path / "prose.txt"
    path.write_text("\n\n".join(parts))
    return path
