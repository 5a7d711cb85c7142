"""What the tests of devices run in a process of its own; prints one line of JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xkv_gguf.errors import XkvWarning
from xkv_gguf.runtime import devices, native, rpc

COUNTS = (2, 3)
"""Layers on each of two servers, the output included, of the four-layer models."""


def full_rank(servers: Sequence[str], fused: bool) -> dict[str, Any]:
    """By model: how far xkv and plain flash attention are from the plain cache, and where things ran."""
    from tests.native import harness
    from tests.native.harness import deviation, run_paths
    from tests.native.sidecars import write_random
    from tests.native.tiny_models import MODELS, N_LAYER, N_VOCAB, write_model

    rpc.connect(servers)
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, N_VOCAB, 1000)]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in MODELS.items():
            path = Path(folder) / f"{name}.gguf"
            write_model(name, path)
            bases = write_random(path.with_suffix(".xkv.gguf"), N_LAYER, (kind.embd_k, kind.embd_v), 2, 32)
            params = replace(bases.params(fused=fused), fused=native.FUSED_RPC if fused else 0)
            model = harness.open_model(path, COUNTS)
            with harness.open_context(model, flash_attn=False) as ctx:
                plain = run_paths(ctx, tokens)
            with harness.open_context(model, exact=False) as ctx:
                flash = run_paths(ctx, tokens)
                splits = devices.context_splits(ctx.ptr)
            with harness.open_context(model, xkv=params) as ctx:
                xkv = run_paths(ctx, tokens)
                parts = devices.context_devices(ctx.ptr)
                found[name] = {
                    "xkv": {path: deviation(xkv[path], plain[path]) for path in plain},
                    "flash": max(deviation(flash[path], plain[path]) for path in plain),
                    "splits": devices.context_splits(ctx.ptr),
                    "plain_splits": splits,
                    "packs": kind.head_k % 16 == 0 and kind.head_v % 16 == 0 and not kind.v_in_k,
                    "devices": {part.name: [part.n_layer, part.n_fused, part.cache] for part in parts},
                }
            harness.close_model(model)
    return found


def cut_group(servers: Sequence[str]) -> str:
    """What a context says of a group of layers on two devices."""
    from tests.native import harness
    from tests.native.sidecars import write_random
    from tests.native.tiny_models import MODELS, N_LAYER, write_model

    rpc.connect(servers)
    kind = MODELS["llama"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama.gguf"
        write_model("llama", path)
        bases = write_random(path.with_suffix(".xkv.gguf"), N_LAYER, (kind.embd_k, kind.embd_v), 4, 32)
        model = harness.open_model(path, COUNTS)
        try:
            with harness.open_context(model, xkv=bases.params()):
                return ""
        except AssertionError:
            return native.last_error()
        finally:
            harness.close_model(model)


def answer(
    model: str, servers: Sequence[str] | None, prompt: str, options: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """The greedy continuation of a prompt, and what is where."""
    from xkv_gguf import Llama

    settings = {"n_ctx": 2048, "verbose": False, "n_threads": 1, "n_threads_batch": 2, "rpc_servers": servers, **more}
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", XkvWarning)
        llm = Llama(model, xkv=options, **settings)
    text = llm.create_completion(prompt, max_tokens=24, temperature=0)["choices"][0]["text"]
    report = llm.kv_report()
    assert llm.xkv_plan is not None
    found = {
        "text": text,
        "n_stored": report.n_stored,
        "devices": report.to_dict()["devices"],
        "predicted": llm.xkv_device_bytes,
        "stages": [stage.n_slot for stage in llm.xkv_plan.stages],
        "notes": [str(note.message) for note in notes if note.category is XkvWarning],
    }
    llm.close()
    return found


def sized(model: str, servers: Sequence[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes on each device: as they are said of a context, and as they are in it."""
    from xkv_gguf import Llama, XkvOptions
    from xkv_gguf.fitting import Fitting
    from xkv_gguf.model.file import open_model

    fused = rpc.connect(servers)
    with Fitting(open_model(model), {"n_gpu_layers": -1}, fused) as fitting:
        said = fitting.xkv(XkvOptions.of(options), None, 2048).sizes.devices
    llm = Llama(model, xkv=options, n_ctx=2048, verbose=False, rpc_servers=servers)
    there = devices.context_devices(llm._ctx.ctx)
    found = []
    for parts in (said, there):
        # a mapped file is memory of another name on the host
        own = [part for part in parts if part.name.startswith("RPC")]
        found.append({part.name: (part.weights, part.cache, part.compute, part.n_fused) for part in own})
    llm.close()
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
