"""Fetching, unpacking and patching the pinned llama.cpp."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest


def prepare(upstream: ModuleType, project: Path, source: Path | None = None) -> Path:
    pin = upstream.Pin.read(project / "upstream.json")
    tree = upstream.prepare(pin, project / "native/patches", project / ".cache", project / "build/upstream", source)
    assert isinstance(tree, Path)
    return tree


def memory_h(tree: Path) -> list[str]:
    return (tree / "src" / "llama-memory.h").read_text().splitlines()


def times(tree: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in tree.rglob("*") if path.is_file()}


def test_unpacks_llama_cpp_alone_and_patches_it(upstream: ModuleType, project: Path) -> None:
    tree = prepare(upstream, project)
    assert sorted(times(tree)) == ["llama-memory.h", "other.h"]
    assert [line for line in memory_h(tree) if not line.startswith("#")] == ["FIVE", "FIFTEEN"]


def test_patches_apply_inside_a_git_work_tree(upstream: ModuleType, project: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    assert "FIVE" in memory_h(prepare(upstream, project))


def test_second_run_touches_nothing(upstream: ModuleType, project: Path) -> None:
    before = times(prepare(upstream, project))
    (project / ".cache" / "llama_cpp_python-9.9.9.tar.gz").unlink()
    assert times(prepare(upstream, project)) == before


def test_changed_patch_touches_only_its_files(upstream: ModuleType, project: Path) -> None:
    before = times(prepare(upstream, project))
    (project / "native" / "patches" / "0002-fifteen.patch").unlink()
    tree = prepare(upstream, project)
    after = times(tree)
    assert "FIFTEEN" not in memory_h(tree)
    assert after["other.h"] == before["other.h"]
    assert after["llama-memory.h"] > before["llama-memory.h"]


def test_file_of_a_removed_patch_goes(upstream: ModuleType, project: Path) -> None:
    extra = project / "native" / "patches" / "0003-extra.patch"
    extra.write_text(
        "diff --git a/src/new.h b/src/new.h\nnew file mode 100644\n--- /dev/null\n+++ b/src/new.h\n@@ -0,0 +1 @@\n+new\n"
    )
    assert (prepare(upstream, project) / "src" / "new.h").read_text() == "new\n"
    extra.unlink()
    assert not (prepare(upstream, project) / "src" / "new.h").exists()


def test_patch_that_does_not_apply_is_named(upstream: ModuleType, project: Path) -> None:
    patch = project / "native" / "patches" / "0002-fifteen.patch"
    patch.write_text(patch.read_text().replace("-# line 15", "-# line fifteen"))
    with pytest.raises(
        upstream.UpstreamError, match=r"0002-fifteen\.patch does not apply .*llama-memory\.h:14"
    ) as info:
        prepare(upstream, project)
    assert "\n" not in str(info.value)
    assert not (project / "build" / "upstream" / "key").exists()


def test_other_sdist_under_the_pinned_name(
    upstream: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = project / ".cache" / "llama_cpp_python-9.9.9.tar.gz"

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / archive.name).write_bytes(b"another")
        return subprocess.CompletedProcess(command, 0, "", "")

    archive.unlink()
    monkeypatch.setattr(upstream.subprocess, "run", pip)
    with pytest.raises(upstream.UpstreamError, match=r"SHA-256 is ae448ac86c4e.*, upstream\.json expects"):
        prepare(upstream, project)
    assert not archive.exists()


def test_pip_that_fails(upstream: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / ".cache" / "llama_cpp_python-9.9.9.tar.gz").unlink()
    failed = subprocess.CompletedProcess([], 1, "", "warning\nno matching distribution\n")
    monkeypatch.setattr(upstream.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(upstream.UpstreamError, match=r"llama-cpp-python==9\.9\.9 \(no matching distribution\)"):
        prepare(upstream, project)


def test_checkout_is_copied_and_not_changed(upstream: ModuleType, project: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkout"
    (source / "src").mkdir(parents=True)
    (source / ".git").mkdir()
    text = "".join(f"# line {number}\n" for number in range(1, 31))
    (source / "src" / "llama-memory.h").write_text(text)
    tree = prepare(upstream, project, source)
    assert "FIVE" in memory_h(tree)
    assert len(memory_h(tree)) == 30
    assert (source / "src" / "llama-memory.h").read_text() == text
    assert not (tree / ".git").exists()
    (source / "src" / "llama-memory.h").write_text(text + "more\n")
    assert memory_h(prepare(upstream, project, source))[-1] == "more"


def test_folder_that_is_no_checkout(upstream: ModuleType, project: Path, tmp_path: Path) -> None:
    with pytest.raises(upstream.UpstreamError, match="not a llama.cpp checkout"):
        prepare(upstream, project, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"package": "llama-cpp-python"}'])
def test_pin_that_is_none(upstream: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "upstream.json").write_text(text)
    with pytest.raises(upstream.UpstreamError, match="not a pin"):
        upstream.Pin.read(tmp_path / "upstream.json")
