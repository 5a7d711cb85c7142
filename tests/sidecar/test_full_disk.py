"""A disk that is full: one line that says so, and the old file stays."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.small_sidecar import small_arrays, small_info
from xkv_gguf.base.files import write_atomic
from xkv_gguf.errors import OptionError, SidecarError, XkvError
from xkv_gguf.sidecar.read import read_sidecar
from xkv_gguf.sidecar.write import write_sidecar

Full = Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=[1, 600])
def full(request: pytest.FixtureRequest) -> Full:
    """Within it, files cannot grow beyond some bytes; Python ignores the signal."""

    @contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request.param, hard))
        try:
            yield
        finally:  # before pytest prints, which may be into a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def one_line(error: XkvError, path: Path) -> bool:
    text = str(error)
    return text.count(str(path)) == 1 and "cannot be written (" in text and "None" not in text and "\n" not in text


def test_a_sidecar(sidecar_file: Path, full: Full) -> None:
    before = sidecar_file.read_bytes()
    info = small_info()
    with full(), pytest.raises(SidecarError) as caught:
        write_sidecar(sidecar_file, info, small_arrays(info))
    assert one_line(caught.value, sidecar_file)
    assert sidecar_file.read_bytes() == before
    assert [path.name for path in sidecar_file.parent.iterdir()] == [sidecar_file.name]
    read_sidecar(sidecar_file)


def test_a_text(tmp_path: Path, full: Full) -> None:
    path = tmp_path / "rows.json"
    with full(), pytest.raises(OptionError) as caught:
        write_atomic(path, "x" * 10000)
    assert one_line(caught.value, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("errno_is_told", [True, False])
def test_an_error_without_a_number(errno_is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy tells how many bytes were written, and no reason."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device") if errno_is_told else OSError("24 requested and 0 written")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", fail)
    info, path = small_info(), tmp_path / "s.xkv.gguf"
    why = "No space left on device" if errno_is_told else "24 requested and 0 written"
    with pytest.raises(SidecarError, match=rf"cannot be written \({why}\)$"):
        write_sidecar(path, info, small_arrays(info))
