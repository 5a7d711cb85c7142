"""Two RPC servers on this machine, each with its CPU as the device."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xkv_gguf.errors import DeviceError
from xkv_gguf.runtime import rpc


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Their endpoints. They serve one process at a time."""
    log = tmp_path_factory.mktemp("rpc") / "log"
    ports = [free_port() for _ in range(2)]
    with log.open("w") as out:
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "xkv_gguf", "rpc-server", "--port", str(port), "--threads", "1"],
                stdout=out,
                stderr=out,
            )
            for port in ports
        ]
        endpoints = tuple(f"127.0.0.1:{port}" for port in ports)
        try:
            for endpoint in endpoints:
                wait_for(endpoint, log)
            yield endpoints
        finally:
            for process in running:
                process.kill()
                process.wait()


def wait_for(endpoint: str, log: Path) -> None:
    """Until a server answers."""
    last = time.monotonic() + 60
    while True:
        try:
            rpc.ask(endpoint)
            return
        except DeviceError:
            assert time.monotonic() < last, log.read_text()
            time.sleep(0.2)


@pytest.fixture(scope="session")
def in_child() -> Iterator[object]:
    """Run `tests.devices.child` in a process of its own: devices stay known to a process, and to all tests after."""
    import json

    def run(what: str, **arguments: object) -> object:
        done = subprocess.run(
            [sys.executable, "-m", "tests.devices.child", what, json.dumps(arguments)],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    yield run
