"""Memory that runs out while a prompt is read: a typed error, and an object that can be used again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

READ = """
import resource, sys
from xkv_gguf import Llama
from xkv_gguf.errors import OutOfMemoryError

threads = {"n_threads": 1, "n_threads_batch": 1}
llm = Llama(sys.argv[1], n_ctx=2048, xkv={"ratio": 7, "calibrate": False}, verbose=False, **threads)
tokens = llm.tokenize(b"The baker opens his shop, and the children walk to school along the wall. " * 120)[:1500]
llm.eval(tokens[:64])
llm.reset()
in_use = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
resource.setrlimit(resource.RLIMIT_AS, (in_use + int(sys.argv[2]) * 2**20, resource.RLIM_INFINITY))
try:
    llm.eval(tokens)
    print("no error")
except OutOfMemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, unlimited)
llm.reset()
llm.eval(tokens)
print(llm.n_tokens)
"""


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
@pytest.mark.parametrize("spare", [3, 6])
def test_reading_a_prompt(spare: int, demo_model: Path) -> None:
    command = [sys.executable, "-c", READ, str(demo_model), str(spare)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    said, n_tokens = done.stdout.splitlines()
    assert "out of memory" in said
    assert n_tokens == "1500"
