"""Layers on the devices of two RPC servers: the same results, bytes where they were predicted, nothing on the host."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf.errors import DeviceError, OptionError
from xkv_gguf.lab.haystack import paragraphs
from xkv_gguf.plan.stages import TENSOR_PAD
from xkv_gguf.runtime import rpc

from .conftest import free_port

# as tests/native/test_full_rank.py
TOL_F32 = 1e-3
TOL_FLASH = 5.0

Run = Callable[..., Any]


@pytest.mark.parametrize("fused", [False, True], ids=["stock ops", "XKV_ATTN"])
def test_full_rank_equals_the_plain_cache(fused: bool, servers: tuple[str, ...], in_child: Run) -> None:
    for name, one in in_child("full_rank", servers=servers, fused=fused).items():
        worst = max(one["xkv"].values())
        assert worst <= TOL_FLASH * one["flash"] + TOL_F32, (name, one)
        # every op of the cache ran where its layer is: the graph is cut where a plain cache's is
        assert one["splits"] == one["plain_splits"], (name, one)
        there = {key: value for key, value in one["devices"].items() if key.startswith("RPC")}
        assert [layers for layers, _, _ in there.values()] == [2, 2]
        assert [n for _, n, _ in there.values()] == ([2, 2] if fused and one["packs"] else [0, 0])
        assert all(n_byte == 0 for key, (_, _, n_byte) in one["devices"].items() if key not in there)


@pytest.mark.model
@pytest.mark.parametrize("fused", [False, True], ids=["stock ops", "XKV_ATTN"])
def test_the_text_is_the_cpus_and_bytes_are_as_predicted(
    fused: bool, servers: tuple[str, ...], in_child: Run, demo_model: Path
) -> None:
    prompt = "\n\n".join(text for text, _ in zip(paragraphs(3), range(14), strict=False))
    options = {"calibrate": False, "ratio": 4, "fused": fused}
    asked = {"model": str(demo_model), "prompt": prompt, "options": options}
    here = in_child("answer", servers=None, **asked)
    there = in_child("answer", servers=servers, **asked)
    assert there["text"] == here["text"] and there["n_stored"] == here["n_stored"] > 500
    found = {name: part for name, part in there["devices"].items() if part["cache_bytes"]}
    assert len(found) == 2 and all(name.startswith("RPC") for name in found)
    assert sum(part["n_layer"] for part in found.values()) == 30
    # what alignment adds, per tensor: bases of each layer and segment, and the window
    room = 30 * 16 * TENSOR_PAD
    for endpoint, predicted in zip(servers, there["predicted"].values(), strict=True):
        assert predicted <= found[f"RPC0[{endpoint}]"]["cache_bytes"] <= predicted + room
    [on_host] = here["devices"].values()
    assert abs(on_host["cache_bytes"] - sum(there["predicted"].values())) <= 2 * room


@pytest.mark.model
def test_borders_move_with_a_note_and_some_layers_stay_here(
    servers: tuple[str, ...], in_child: Run, demo_model: Path
) -> None:
    options = {"calibrate": False, "ratio": 4}
    asked = {"model": str(demo_model), "prompt": "One, two, three,", "options": options}
    found = in_child("answer", servers=servers, n_gpu_layers=19, tensor_split=[12.0, 7.0], **asked)
    # groups of five layers: of 12, 12 and 6 layers, 10 stay here and borders are at 10 and 25
    layers = [part["n_layer"] for part in found["devices"].values() if part["n_layer"]]
    assert sorted(layers) == [5, 10, 15] and found["devices"]["CPU"]["n_layer"] == 10
    [note] = found["notes"]
    assert note == "layers that share coefficients stay together: devices begin at layers 10, 25 instead of 12, 24"


@pytest.mark.model
def test_sizes_by_device_are_those_that_are_allocated(
    servers: tuple[str, ...], in_child: Run, demo_model: Path
) -> None:
    options = {"calibrate": False, "ratio": 4}
    said, there = in_child("sized", servers=servers, model=str(demo_model), options=options)
    assert said.keys() == there.keys() and len(said) == 2
    for name, (weights, cache, compute, n_fused) in there.items():
        assert said[name][:2] == [weights, cache] and said[name][3] == n_fused > 0
        # of two devices' graphs, llama.cpp says up to 5 % more than it allocates
        assert compute <= said[name][2] and sum(said[name][:3]) <= 1.03 * (weights + cache + compute)


def test_layers_that_share_coefficients_are_on_one_device(servers: tuple[str, ...], in_child: Run) -> None:
    text = in_child("cut_group", servers=servers)
    assert "group 0 has layer 0 on RPC0" in text and "tensor_split" in text


def test_run_takes_servers(servers: tuple[str, ...], tiny_model: Path) -> None:
    command = [sys.executable, "-m", "xkv_gguf", "run", str(tiny_model), "--raw", "-p", "a b c", "-n", "4", "--stats"]
    options = ["--no-calibration", "--n-ctx", "1024", "--ratio", "2", "--rpc", ",".join(servers)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "on RPC0[" in done.stderr and "attention by fused op" in done.stderr


def test_doctor_shows_devices_and_what_is_fused(servers: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "xkv_gguf", "doctor", "--rpc", ",".join(servers)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(endpoint in shown for endpoint in servers) and shown.count("one op") == 3
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert [(one["kind"], one["fused"]) for one in found["devices"]] == [("cpu", True), ("rpc", True), ("rpc", True)]
    gone = [sys.executable, "-m", "xkv_gguf", "doctor", "--rpc", f"127.0.0.1:{free_port()}"]
    done = subprocess.run(gone, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_bench_measures_caches_on_servers_one_after_the_other(servers: tuple[str, ...], tiny_model: Path) -> None:
    command = [sys.executable, "-m", "xkv_gguf", "bench", str(tiny_model), "--caches", "f16,xkv:2", "--depths", "0"]
    options = ["--n-ctx", "1024", "--no-calibration", "--reps", "1", "--threads", "1", "--rpc", ",".join(servers)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "one run one cache after the other" in done.stdout


def test_a_server_says_what_it_cannot_do() -> None:
    command = [sys.executable, "-m", "xkv_gguf", "rpc-server", "--port", str(free_port())]
    done = subprocess.run([*command, "--devices", "XYZ"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "device XYZ is unknown, expected one of CPU" in done.stderr
    done = subprocess.run([*command, "--port", "70000"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "a port from 1 to 65535" in done.stderr


@pytest.mark.parametrize("text", ["", "host", "host:", "host:0", "host:65536", ":1", "a:1,a:1", "a:1,", "a:1b"])
def test_what_is_no_list_of_servers_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="rpc_servers: "):
        rpc.parse_servers(text)


def test_servers_are_a_text_or_a_list() -> None:
    assert rpc.parse_servers("a:1, b:02") == rpc.parse_servers(["a:1", "b:2"]) == ("a:1", "b:2")
    with pytest.raises(OptionError, match="at most 16"):
        rpc.parse_servers([f"a:{port}" for port in range(1, 18)])


def test_nobody_there_is_said_so() -> None:
    with pytest.raises(DeviceError, match="xkv-gguf rpc-server"):
        rpc.ask(f"127.0.0.1:{free_port()}")


@pytest.mark.parametrize(
    ("reply", "expected"), [(b"HTTP/1.1 400\r\n\r\n", "no RPC server"), (None, "one client at a time")]
)
def test_another_kind_of_server_is_told_apart(reply: bytes | None, expected: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(64)
                if reply is not None:
                    connection.sendall(reply)
                else:
                    connection.recv(64)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(DeviceError, match=expected):
            rpc.ask(f"127.0.0.1:{listener.getsockname()[1]}", timeout=0.5)
        thread.join()


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor, _ = rpc.version()
    monkeypatch.setattr(rpc, "ask", lambda endpoint: rpc.Server(endpoint, (major + 1, minor, 0)))
    with pytest.raises(DeviceError, match="same version"):
        rpc.connect(["far:1"])


def test_only_servers_of_this_library_have_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    own = rpc.version()
    assert own[2] >= 128  # upstream counts from 0
    versions = {"ours:1": own, "upstreams:1": (*own[:2], 0)}
    added: list[str] = []
    monkeypatch.setattr(rpc, "_fused", {})
    monkeypatch.setattr(rpc, "_add", added.append)
    monkeypatch.setattr(rpc, "ask", lambda endpoint: rpc.Server(endpoint, versions[endpoint]))
    assert rpc.connect(["ours:1"]) and rpc.is_fused("ours:1")
    assert not rpc.connect(["ours:1", "upstreams:1"]) and not rpc.is_fused("upstreams:1")
    assert added == ["ours:1", "upstreams:1"]  # each once
