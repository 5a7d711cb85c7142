"""make refresh-patches: the series follows a new pin, and a conflict says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

WritePin = Callable[[Path, str], None]
NEW = "".join(f"# added {number}\n" for number in range(1, 10)) + "".join(
    f"# line {number}\n" for number in range(1, 21)
)


def patches(project: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((project / "native" / "patches").iterdir())}


def test_same_pin_changes_nothing(refresh: ModuleType, project: Path) -> None:
    refresh.refresh(project, resuming=False)  # git adds its function lines to the headers of the hunks
    before = patches(project)
    assert refresh.refresh(project, resuming=False) == []
    assert patches(project) == before


def test_moved_lines_are_followed(refresh: ModuleType, project: Path, write_pin: WritePin) -> None:
    write_pin(project, NEW)
    assert refresh.refresh(project, resuming=False) == ["0001-five.patch", "0002-fifteen.patch"]
    text = patches(project)["0001-five.patch"]
    assert text.startswith("What the patch does.\n\ndiff --git ")
    assert "@@ -13,3 +13,3 @@" in text


def test_context_grows_where_one_line_is_ambiguous(refresh: ModuleType, project: Path, write_pin: WritePin) -> None:
    # the same three lines stand at 4 and at 11: only more context tells the hunk's place
    lines = [f"# line {number}" for number in range(1, 21)]
    lines[10:13] = lines[3:6]
    write_pin(project, "\n".join(lines) + "\n")
    refresh.refresh(project, resuming=False)
    assert "@@ -3,5 +3,5 @@" in patches(project)["0001-five.patch"]


def test_conflict_is_explained_and_can_be_resolved(refresh: ModuleType, project: Path, write_pin: WritePin) -> None:
    write_pin(project, NEW.replace("# line 5\n", "# line five\n"))
    before = patches(project)
    with pytest.raises(refresh.ConflictError, match=r"0001-five\.patch does not apply") as info:
        refresh.refresh(project, resuming=False)
    assert "src/llama-memory.h.rej" in str(info.value)
    assert "make refresh-patches CONTINUE=1" in str(info.value)
    assert patches(project) == before

    with pytest.raises(refresh.UpstreamError, match="unfinished work"):
        refresh.refresh(project, resuming=False)
    with pytest.raises(refresh.UpstreamError, match="still there"):
        refresh.refresh(project, resuming=True)

    source = project / "build" / "refresh" / "llama.cpp" / "src"
    (source / "llama-memory.h.rej").unlink()
    (source / "llama-memory.h").write_text((source / "llama-memory.h").read_text().replace("# line five", "FIVE"))
    assert refresh.refresh(project, resuming=True) == ["0001-five.patch", "0002-fifteen.patch"]
    assert "-# line five\n+FIVE\n" in patches(project)["0001-five.patch"]


def test_commit_by_hand_becomes_a_patch(refresh: ModuleType, project: Path) -> None:
    refresh.refresh(project, resuming=False)
    tree = project / "build" / "refresh" / "llama.cpp"
    (tree / "src" / "other.h").write_text("changed\n")
    with pytest.raises(refresh.UpstreamError, match="beyond the series"):
        refresh.refresh(project, resuming=True)
    refresh.git(tree, "commit", "--quiet", "--all", "-m", "Other file\n\nWhy.")
    assert refresh.refresh(project, resuming=True) == ["0003-other-file.patch"]
    assert patches(project)["0003-other-file.patch"].startswith("Why.\n\ndiff --git a/src/other.h")


def test_nothing_to_continue(refresh: ModuleType, project: Path) -> None:
    with pytest.raises(refresh.UpstreamError, match="nothing to continue"):
        refresh.refresh(project, resuming=True)
