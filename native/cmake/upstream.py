"""Puts the pinned and patched llama.cpp into the build folder.

``upstream.json`` pins an sdist of llama-cpp-python, which carries llama.cpp under ``vendor/llama.cpp``. pip fetches
it by name into a cache folder, its SHA-256 is checked, llama.cpp is unpacked, and the patch series is applied.
A file whose text did not change keeps its time stamp, so a change in one patch rebuilds only what it touches.

    python upstream.py --pin upstream.json --patches native/patches --cache .cache --out BUILD/upstream [--source DIR]
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VENDOR = "vendor/llama.cpp/"
# large, and of no use to the libraries or to the converter
SKIPPED = {".devops", ".git", ".github", "benches", "build", "docs", "media", "models", "skills"}


class UpstreamError(Exception):
    """One line that says what went wrong and what to do."""


@dataclass(frozen=True)
class Pin:
    """The sdist that upstream.json names."""

    package: str
    version: str
    sha256: str

    @classmethod
    def read(cls, path: Path) -> Pin:
        """Read a pin; raises UpstreamError when the file is not one."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(fields["package"], fields["version"], fields["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UpstreamError(f"{path}: not a pin with the texts package, version and sha256: {error!r}") from error

    @property
    def archive(self) -> str:
        """File name of the sdist."""
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(pin: Pin, cache: Path) -> Path:
    """Path of the verified sdist in ``cache``; pip runs only when it is not there yet."""
    archive = cache / pin.archive
    if archive.is_file() and sha256_file(archive) == pin.sha256:
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    spec = f"{pin.package}=={pin.version}"
    print(f"fetching {spec}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", pin.package, "--dest", folder, spec]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        fetched = Path(folder) / pin.archive
        if done.returncode or not fetched.is_file():
            detail = (done.stderr.strip() or "no output").splitlines()[-1]
            raise UpstreamError(
                f"pip could not fetch the sdist of {spec} ({detail}); "
                "with a llama.cpp checkout at hand, pass -DXKV_LLAMA_CPP_SOURCE=DIR"
            )
        found = sha256_file(fetched)
        if found != pin.sha256:
            raise UpstreamError(
                f"{pin.archive}: SHA-256 is {found}, upstream.json expects {pin.sha256}; "
                "fetch it again, or correct the pin"
            )
        os.replace(fetched, archive)
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Write the sdist's llama.cpp into ``folder``."""
    n_files = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            _, _, name = member.name.partition("/")
            parts = name.removeprefix(VENDOR).split("/")
            if not name.startswith(VENDOR) or not member.isfile() or parts[0] in SKIPPED or ".." in parts:
                continue
            source = tar.extractfile(member)
            if source is None:
                continue
            path = folder.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(source, file)
            n_files += 1
    if n_files == 0:
        raise UpstreamError(f"{archive}: holds no {VENDOR}; the pin is not an sdist of llama-cpp-python")


def source_files(source: Path) -> Iterator[Path]:
    """Relative paths of the files of a checkout that a build uses, sorted."""
    for top in sorted(source.iterdir()):
        if top.name in SKIPPED or top.name.startswith("build-"):
            continue
        if top.is_file():
            yield top.relative_to(source)
        elif top.is_dir():
            for path in sorted(top.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    yield path.relative_to(source)


def copy_source(source: Path, folder: Path) -> None:
    """Copy a checkout's files into ``folder``."""
    for name in source_files(source):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def patch_files(patches: Path) -> list[Path]:
    """The series, in order."""
    return sorted(patches.glob("[0-9][0-9][0-9][0-9]-*.patch"))


def git_environment(folder: Path) -> dict[str, str]:
    """Environment in which git takes ``folder`` for a plain folder, whatever work tree it lies in."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(folder.resolve().parent)
    env["GIT_CONFIG_GLOBAL"] = os.devnull
    env["GIT_CONFIG_NOSYSTEM"] = "1"
    env["LC_ALL"] = "C"
    return env


def apply_patch(patch: Path, folder: Path) -> None:
    """Apply one patch; raises UpstreamError that names it when it does not apply as a whole."""
    command = ["git", "apply", "--verbose", "--whitespace=nowarn", str(patch.resolve())]
    try:
        done = subprocess.run(command, cwd=folder, env=git_environment(folder), capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UpstreamError("git is needed to apply the patches and was not found; install git") from error
    # inside a work tree git skips files without an error
    skipped = [line for line in done.stderr.splitlines() if line.startswith("Skipped patch")]
    if done.returncode or skipped:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ") and line[-1] != ":"]
        detail = "; ".join(errors + skipped) or done.stderr.strip()
        raise UpstreamError(f"{patch.name} does not apply to llama.cpp: {detail}; see `make refresh-patches`")


def tree_key(pin: Pin, patches: list[Path], source: Path | None) -> str:
    """Hash over all that decides what the prepared tree holds."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    if source is None:
        digest.update(f"{pin.package} {pin.version} {pin.sha256}".encode())
    else:
        for name in source_files(source):
            digest.update(f"{name.as_posix()} {sha256_file(source / name)}".encode())
    for patch in patches:
        digest.update(f"{patch.name} {sha256_file(patch)}".encode())
    return digest.hexdigest()


def synchronize(staged: Path, target: Path) -> None:
    """Make ``target`` hold what ``staged`` holds, touching only the files that differ."""
    if not target.exists():
        os.replace(staged, target)
        return
    wanted = {path.relative_to(staged) for path in staged.rglob("*") if path.is_file()}
    present = {path.relative_to(target) for path in target.rglob("*") if path.is_file()}
    for name in present - wanted:
        (target / name).unlink()
    for name in wanted:
        if name not in present or not filecmp.cmp(staged / name, target / name, shallow=False):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / name, target / name)


def prepare(pin: Pin, patches: Path, cache: Path, out: Path, source: Path | None = None) -> Path:
    """Fetch, unpack and patch llama.cpp into ``out/llama.cpp``; does nothing when that is up to date.

    Parameters
    ----------
    pin : the sdist to use
    patches : folder of the series
    cache : folder that keeps the sdist
    out : folder of the result; ``out/key`` holds the hash of what it was made from
    source : a llama.cpp checkout to copy instead of the sdist; it is not changed

    Returns
    -------
    The prepared tree.

    Raises
    ------
    UpstreamError
        The sdist cannot be had or is another one, or a patch does not apply.
    """
    if source is not None and not (source / "src" / "llama-memory.h").is_file():
        raise UpstreamError(f"XKV_LLAMA_CPP_SOURCE={source}: not a llama.cpp checkout (no src/llama-memory.h)")
    series = patch_files(patches)
    key = tree_key(pin, series, source)
    key_file, tree = out / "key", out / "llama.cpp"
    if tree.is_dir() and key_file.is_file() and key_file.read_text() == key:
        return tree
    out.mkdir(parents=True, exist_ok=True)
    key_file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="stage-") as folder:
        staged = Path(folder) / "llama.cpp"
        staged.mkdir()
        if source is None:
            unpack(fetch(pin, cache), staged)
        else:
            copy_source(source, staged)
        for patch in series:
            apply_patch(patch, staged)
        synchronize(staged, tree)
    key_file.write_text(key)
    return tree


def main() -> int:
    """Command line, called by CMake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("pin", "patches", "cache", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--source", type=Path)
    args = parser.parse_args()
    try:
        prepare(Pin.read(args.pin), args.patches, args.cache, args.out, args.source)
    except UpstreamError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
