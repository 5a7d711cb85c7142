"""What all refusals of the front have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xkv_gguf.errors import XkvError


def refused(kind: type[XkvError], expected: str, act: Callable[[], Any]) -> None:
    """`act` raises `kind` itself, with one line that holds `expected`."""
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    text = str(caught.value)
    assert expected in text, text
    assert "\n" not in text
