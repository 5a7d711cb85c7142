"""Writing a sidecar: deterministic bytes, and the file appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType, GGUFWriter

from ..base.files import check_writable, replacing
from ..errors import SidecarError
from .info import ARCHITECTURE, FILE_TYPE, FORMAT_VERSION, SidecarInfo, check_info, tensor_name
from .read import DIGEST_AT, file_digest

Array = npt.NDArray[Any]


def _add_fields(writer: GGUFWriter, info: SidecarInfo) -> None:
    def string(key: str, value: str) -> None:
        # add_string drops empty strings
        writer.add_key_value(key, value, GGUFValueType.STRING)

    def array(key: str, values: list[int]) -> None:
        writer.add_key_value(key, values, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32)

    def floats(key: str, values: list[float]) -> None:
        writer.add_key_value(key, values, GGUFValueType.ARRAY, sub_type=GGUFValueType.FLOAT32)

    writer.add_uint32("xkv.format_version", FORMAT_VERSION)
    string("xkv.digest", "0" * 64)
    string("general.type", FILE_TYPE)
    string("xkv.model.fingerprint", info.fingerprint)
    string("xkv.model.architecture", info.architecture)
    string("xkv.model.name", info.name)
    writer.add_uint32("xkv.layer_count", info.n_layer)
    array("xkv.embd_k", list(info.embd_k))
    array("xkv.embd_v", list(info.embd_v))
    floats("xkv.scale_k", list(info.scales("k")))
    floats("xkv.scale_v", list(info.scales("v")))
    writer.add_uint32("xkv.group_size", info.group_size)
    writer.add_uint32("xkv.frame", info.frame)
    writer.add_uint32("xkv.n_sink", info.n_sink)
    array("xkv.group.count", [len(g.layers) for g in info.groups])
    array("xkv.group.layers", [il for g in info.groups for il in g.layers])
    floats("xkv.group.weight_k", [g.weight_k for g in info.groups])
    floats("xkv.group.weight_v", [g.weight_v for g in info.groups])
    writer.add_float32("xkv.kld_scale", info.kld_scale)
    string("xkv.plan.knob", info.target.kind)
    string("xkv.plan.value", info.target.value)
    writer.add_uint32("xkv.plan.n_ctx", info.n_ctx)
    string("xkv.calibration.source", info.calibration.source)
    writer.add_uint64("xkv.calibration.tokens", info.calibration.tokens)
    writer.add_uint64("xkv.calibration.seed", info.calibration.seed)
    writer.add_uint32("xkv.calibration.n_ctx", info.calibration.n_ctx)
    string("xkv.calibration.text_sha256", info.calibration.text_sha256)
    string("xkv.settings", json.dumps(dict(info.settings), sort_keys=True, separators=(",", ":")))


def write_sidecar(path: str | Path, info: SidecarInfo, arrays: Mapping[str, Array]) -> None:
    """Write a sidecar file.

    The bytes depend on the arguments only. An interruption leaves nothing under `path`, and an old file there stays
    until the new one is complete.

    Parameters
    ----------
    path : str or Path
    info : SidecarInfo
    arrays : mapping of str to ndarray
        All arrays by `tensor_name`: bases f16 or f32 (R, D), means and spectra f32 (D,).

    Raises
    ------
    ValueError
        The values are not possible ones (a mistake of the caller).
    OptionError, SidecarError
        The file cannot be written.
    """
    path = Path(path)
    check_info(info)
    names = [
        tensor_name(g, kind, part)
        for g in range(len(info.groups))
        for kind in info.kinds(g)
        for part in ("basis", "mean", "spectrum")
    ]
    if set(names) != set(arrays):
        raise ValueError(f"arrays {sorted(set(names) ^ set(arrays))} are missing or unknown")
    writer = GGUFWriter(None, ARCHITECTURE)
    _add_fields(writer, info)
    for name in names:
        writer.add_tensor(name, np.ascontiguousarray(arrays[name]))
    check_writable(path)
    try:
        with replacing(path) as temp:
            writer.write_header_to_file(temp)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            digest = file_digest(temp)
            with temp.open("r+b") as file:
                file.seek(DIGEST_AT)
                file.write(digest.encode())
                file.flush()
                os.fsync(file.fileno())
    except OSError as err:
        raise SidecarError(f"sidecar {path}: cannot be written ({err.strerror or err})") from err
    finally:
        with contextlib.suppress(OSError):  # what is left in its buffers finds no room either
            writer.close()
