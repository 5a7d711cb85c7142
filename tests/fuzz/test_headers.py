"""Some of what `make fuzz` tries with the Python readers."""

from __future__ import annotations

import pytest

from . import headers


def test_damaged_headers(capsys: pytest.CaptureFixture[str]) -> None:
    assert headers.main(["5000", "--seed", "2"]) == 0
    assert capsys.readouterr().out.count("taken, the rest refused") == 2
