"""Re-creates the patch series in native/patches against the pin in upstream.json.

    python refresh.py            start anew: unpack the pinned llama.cpp, apply the series patch by patch
    python refresh.py --continue go on after a conflict was resolved, or write out commits that were added by hand

The work happens in build/refresh/llama.cpp, a git repository with one commit per patch on top of upstream's files.
At the end each commit is written as one patch, with the least context that still applies to the same place.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import upstream
from upstream import Pin, UpstreamError

ROOT = Path(__file__).resolve().parents[2]
BASE_TAG = "upstream"
IDENTITY = ["-c", "user.name=xkv-gguf", "-c", "user.email=xkv-gguf@localhost", "-c", "commit.gpgsign=false"]


class ConflictError(Exception):
    """A patch does not apply; the text says what to do."""


def git(tree: Path, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run git in the work tree, with none of the user's settings."""
    command = ["git", *IDENTITY, "-c", "core.autocrlf=false", *args]
    env = upstream.git_environment(tree)
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if check and done.returncode:
        raise UpstreamError(f"git {args[0]} failed in {tree}: {done.stderr.strip()}")
    return done


def split_patch(text: str) -> tuple[str, str]:
    """Description and diff of a patch file."""
    match = re.search(r"^(diff --git |--- )", text, re.MULTILINE)
    if match is None:
        raise UpstreamError("a patch file without a diff")
    return text[: match.start()].strip(), text[match.start() :]


def start(pin: Pin, cache: Path, tree: Path, source: Path | None) -> None:
    """Make the repository, with upstream's files in its first commit."""
    tree.mkdir(parents=True)
    if source is None:
        upstream.unpack(upstream.fetch(pin, cache), tree)
    else:
        upstream.copy_source(source, tree)
    git(tree, "init", "--quiet")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "-m", f"{pin.package} {pin.version}")
    git(tree, "tag", BASE_TAG)


def commit(tree: Path, patch: Path) -> None:
    """Commit the changes of one patch, with its name and description as the message."""
    description, _ = split_patch(patch.read_text(encoding="utf-8"))
    name = patch.stem.partition("-")[2]
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--allow-empty", "-m", f"{name}\n\n{description}")


def applied_count(tree: Path) -> int:
    """Number of commits on top of upstream's files."""
    return int(git(tree, "rev-list", "--count", f"{BASE_TAG}..HEAD").stdout)


def apply_rest(tree: Path, series: list[Path]) -> None:
    """Apply and commit the patches that are not yet commits; raises ConflictError at the first that does not apply."""
    for patch in series[applied_count(tree) :]:
        exact = git(tree, "apply", "--whitespace=nowarn", str(patch), check=False)
        if exact.returncode:
            git(tree, "apply", "--whitespace=nowarn", "--reject", str(patch), check=False)
            rejects = sorted(str(path.relative_to(tree)) for path in tree.rglob("*.rej"))
            raise ConflictError(
                f"{patch.name} does not apply.\n"
                f"  Hunks left to place by hand, in {tree}:\n"
                + "".join(f"    {name}\n" for name in rejects or ["(none: a file of the patch is gone)"])
                + f"{exact.stderr.strip()}\n"
                "  1. Edit the files there so that they do what the patch says.\n"
                "  2. Delete the .rej files.\n"
                "  3. make refresh-patches CONTINUE=1"
            )
        commit(tree, patch)


def resume(tree: Path, series: list[Path]) -> None:
    """Commit what was resolved by hand as the patch that had failed."""
    if not (tree / ".git").is_dir():
        raise UpstreamError(f"{tree}: nothing to continue; run make refresh-patches")
    rejects = sorted(tree.rglob("*.rej"))
    if rejects:
        raise UpstreamError(f"{rejects[0]} is still there: place its hunks, then delete it")
    if git(tree, "status", "--porcelain").stdout.strip():
        done = applied_count(tree)
        if done >= len(series):
            raise UpstreamError(f"{tree} has changes beyond the series: commit them there, the subject names the patch")
        commit(tree, series[done])


def least_context(tree: Path, revision: str) -> str:
    """Diff of one commit with the fewest lines of context with which it applies to the same place.

    One line at the least: a hunk without context goes by its line number alone.
    """
    wanted = git(tree, "rev-parse", f"{revision}^{{tree}}").stdout
    for lines in range(1, 4):
        diff = git(tree, "diff", f"-U{lines}", "--no-renames", f"{revision}~1", revision).stdout
        # also from a place that is off by lines that upstream may add above
        shifted = re.sub(r"(?m)^@@ -([1-9]\d*)(\S*) \+([1-9]\d*)", shift, diff)
        if all(tree_after(tree, f"{revision}~1", text) == wanted for text in (diff, shifted)):
            return diff
    return diff


def shift(hunk: re.Match[str], lines: int = 7) -> str:
    """Hunk header that points some lines further down."""
    return f"@@ -{int(hunk[1]) + lines}{hunk[2]} +{int(hunk[3]) + lines}"


def tree_after(tree: Path, revision: str, diff: str) -> str:
    """Id of the git tree that a diff makes of a revision; empty when it does not apply."""
    with tempfile.TemporaryDirectory() as folder:
        env = upstream.git_environment(tree) | {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        steps = (["read-tree", revision], ["apply", "--cached", "--whitespace=nowarn", "-"], ["write-tree"])
        for step in steps:
            text = diff if step[0] == "apply" else ""
            done = subprocess.run(["git", *step], cwd=tree, env=env, input=text, capture_output=True, text=True)
            if done.returncode:
                return ""
        return done.stdout


def write_series(tree: Path, patches: Path) -> list[str]:
    """Replace the series by one patch per commit; returns the names of the files that changed."""
    before = {path.name: path.read_text(encoding="utf-8") for path in upstream.patch_files(patches)}
    after: dict[str, str] = {}
    revisions = git(tree, "rev-list", "--reverse", f"{BASE_TAG}..HEAD").stdout.split()
    for number, revision in enumerate(revisions, start=1):
        subject, _, body = git(tree, "log", "-1", "--format=%B", revision).stdout.strip().partition("\n")
        slug = re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")
        diff = least_context(tree, revision)
        if not diff:
            print(f"{subject}: empty now (upstream holds it), left out")
            continue
        diff = re.sub(r"^index .*\n", "", diff, flags=re.MULTILINE)
        after[f"{number:04d}-{slug}.patch"] = (f"{body.strip()}\n\n" if body.strip() else "") + diff
    for name in before.keys() - after.keys():
        (patches / name).unlink()
    for name, text in after.items():
        (patches / name).write_text(text, encoding="utf-8")
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def refresh(root: Path, resuming: bool, source: Path | None = None) -> list[str]:
    """Run the refresh for the repository at ``root``; returns the names of the patches that changed."""
    tree, patches = root / "build" / "refresh" / "llama.cpp", root / "native" / "patches"
    series = upstream.patch_files(patches)
    if resuming:
        resume(tree, series)
    else:
        if (tree / ".git").is_dir() and git(tree, "status", "--porcelain").stdout.strip():
            raise UpstreamError(f"{tree} has unfinished work: make refresh-patches CONTINUE=1, or delete that folder")
        shutil.rmtree(tree, ignore_errors=True)
        start(Pin.read(root / "upstream.json"), root / ".cache", tree, source)
    apply_rest(tree, series)
    return write_series(tree, patches)


def main() -> int:
    """Command line, called by make."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--continue", dest="resuming", action="store_true", help="go on after a conflict")
    parser.add_argument("--source", type=Path, help="a llama.cpp checkout to use instead of the pinned sdist")
    args = parser.parse_args()
    try:
        changed = refresh(ROOT, args.resuming, args.source)
    except (UpstreamError, ConflictError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(f"changed: {name}" for name in changed) or "the series is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
