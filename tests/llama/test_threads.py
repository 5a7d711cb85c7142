"""Objects that are made in several threads at once. In a process of its own: what goes wrong there ends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MAKE = """
import sys, threading
from xkv_gguf import Llama

def make():
    for _ in range(6):
        Llama(sys.argv[1], kv_mode="f16", n_ctx=256, n_threads=1, verbose=False).close()

threads = [threading.Thread(target=make) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("done")
try: Llama("no/such/model.gguf")
except Exception as error: print(error)
print("still here", file=sys.stderr)
"""

VERBOSE = """
import sys, threading
from xkv_gguf import Llama

stop = threading.Event()
def quiet():
    while not stop.is_set():
        Llama(sys.argv[1], kv_mode="f16", n_ctx=256, n_threads=1, verbose=False).close()

thread = threading.Thread(target=quiet)
thread.start()
for i in range(6):
    print(f"begin {i}", file=sys.stderr, flush=True)
    Llama(sys.argv[1], kv_mode="f16", n_ctx=256, n_threads=1, verbose=True).close()
stop.set()
thread.join()
"""


def run(text: str, model: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", text, str(model)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_objects_in_several_threads(tiny_model: Path) -> None:
    done = run(MAKE, tiny_model)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["done", "model no/such/model.gguf: no such file"]
    assert "still here" in done.stderr


def test_a_quiet_object_silences_no_other(tiny_model: Path) -> None:
    """All of an object's log is there, whatever is made quietly beside it."""
    done = run(VERBOSE, tiny_model)
    assert done.returncode == 0, done.stderr
    logs = done.stderr.split("begin ")[1:]
    assert len(logs) == 6
    for text in logs:
        assert "llama_model_loader: loaded meta data" in text
        assert "llama_context: n_ctx" in text
