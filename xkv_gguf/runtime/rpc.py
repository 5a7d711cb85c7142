"""Devices of other machines, by the servers of llama.cpp's RPC backend.

ggml ends the process where a server does not answer or speaks another protocol, so a server is asked before: its first
answer is its version. The patch level of a server of this package's library is that of the library; only those have the
op XKV_ATTN.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DeviceError, OptionError
from . import native

HELLO = 14  # RPC_CMD_HELLO
CAPABILITIES = bytes(24)  # RPC_CONN_CAPS_SIZE: TCP alone
ANSWER = 4 + len(CAPABILITIES)  # version, padding, capabilities
TIMEOUT = 5.0
MAX_SERVERS = 16
MAX_PORT = 65535

Version = tuple[int, int, int]
_fused: dict[str, bool] = {}
"""The servers that this process knows, and whether they have XKV_ATTN."""


@dataclass(frozen=True)
class Server:
    """A server that answered: its address, and the version of its protocol."""

    endpoint: str
    version: Version


def parse_servers(servers: str | Sequence[str]) -> tuple[str, ...]:
    """Read a list of servers, such as ``"10.0.0.2:50052,10.0.0.3:50052"``.

    Raises
    ------
    OptionError
        One is no ``HOST:PORT``, or is named twice, or there are too many.
    """
    words = servers.split(",") if isinstance(servers, str) else list(servers)
    found: list[str] = []
    for word in words:
        host, _, port = str(word).strip().rpartition(":")
        if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) <= MAX_PORT:
            raise OptionError(f"rpc_servers: {str(word)!r}, expected HOST:PORT with a port from 1 to {MAX_PORT}")
        endpoint = f"{host}:{int(port)}"
        if endpoint in found:
            raise OptionError(f"rpc_servers: {endpoint} is named twice")
        found.append(endpoint)
    if len(found) > MAX_SERVERS:
        raise OptionError(f"rpc_servers: {len(found)} servers, expected at most {MAX_SERVERS}")
    return tuple(found)


def ask(endpoint: str, timeout: float = TIMEOUT) -> Server:
    """Ask a server for its version.

    Parameters
    ----------
    endpoint : str
        HOST:PORT.
    timeout : float
        Seconds to wait for each step.

    Returns
    -------
    Server

    Raises
    ------
    DeviceError
        Nothing answers there, or what answers is no RPC server of llama.cpp.
    """
    host, _, port = endpoint.rpartition(":")
    request = struct.pack("<BQ", HELLO, len(CAPABILITIES)) + CAPABILITIES
    try:
        with socket.create_connection((host, int(port)), timeout) as connection:
            connection.sendall(request)
            data = b""
            while len(data) < 8 + ANSWER and (part := connection.recv(8 + ANSWER - len(data))):
                data += part
    except TimeoutError as error:
        raise DeviceError(
            f"RPC server {endpoint}: no answer after {timeout:g} s; it serves one client at a time, or is not there"
        ) from error
    except OSError as error:
        raise DeviceError(
            f"RPC server {endpoint}: {error.strerror or error}; start one there with `xkv-gguf rpc-server`"
        ) from error
    if len(data) < 8 + ANSWER or struct.unpack_from("<Q", data)[0] != ANSWER:
        raise DeviceError(
            f"RPC server {endpoint}: what answers is no RPC server of llama.cpp, or one of another version"
        )
    return Server(endpoint, struct.unpack_from("<BBB", data, 8))


def connect(endpoints: Sequence[str]) -> bool:
    """Make the devices of servers known to this process, for models that are loaded from now on.

    Parameters
    ----------
    endpoints : sequence of str
        See `parse_servers`. A server that is known already stays so.

    Returns
    -------
    bool
        Whether all of them have the op XKV_ATTN.

    Raises
    ------
    DeviceError
        A server does not answer, or speaks another version of the protocol.
    """
    own = version()
    for endpoint in endpoints:
        if endpoint in _fused:
            continue  # it serves this process, and would not answer a second time
        server = ask(endpoint)
        major, minor, patch = server.version
        if major != own[0] or minor > own[1]:
            raise DeviceError(
                f"RPC server {endpoint}: protocol {major}.{minor}.{patch}, expected {own[0]}.{own[1]}; "
                "run the same version of llama.cpp or xkv-gguf on both machines"
            )
        _add(endpoint)
        _fused[endpoint] = server.version == own
    return all(_fused[endpoint] for endpoint in endpoints)


def is_fused(endpoint: str) -> bool:
    """Whether a server that this process knows has the op XKV_ATTN."""
    return _fused.get(endpoint, False)


def version() -> tuple[int, int, int]:
    """Version of the protocol that the library's RPC backend speaks."""
    api = native.native()
    version = api.ffi.new("uint32_t[3]")
    native.check_status(api.lib.xkv_rpc_version(version))
    return int(version[0]), int(version[1]), int(version[2])


def _add(endpoint: str) -> None:
    """Make the devices of an RPC server known. ggml ends the process where it does not answer."""
    api = native.native()
    native.check_status(api.lib.xkv_rpc_add(endpoint.encode()))


def serve(endpoint: str, devices: str | None, threads: int) -> None:
    """Serve devices of this machine until the process ends.

    Raises
    ------
    XkvError
        A device is unknown, or the address cannot be had.
    """
    api = native.native()
    names = api.ffi.NULL if devices is None else devices.encode()
    native.check_status(api.lib.xkv_rpc_serve(endpoint.encode(), names, threads))
