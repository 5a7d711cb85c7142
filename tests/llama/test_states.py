"""States as objects and files: what is loaded goes on as what was saved, and what is foreign changes nothing."""

from __future__ import annotations

import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaDiskCache, LlamaRAMCache

from xkv_gguf import Llama, states
from xkv_gguf.base.divergence import kl_divergence, log_softmax
from xkv_gguf.errors import StateError

from ..tiny import weights, write_tiny

N_CTX = 1024
PROMPT = "".join(f"{i} stones in the river, " for i in range(20)) + "x"
Open = Callable[..., Llama]


@pytest.fixture
def open_tiny(tiny_model: Path) -> Iterator[Open]:
    opened: list[Llama] = []

    def open_one(path: Path = tiny_model, kv_mode: str = "xkv", **kwargs: Any) -> Llama:
        xkv = {"calibrate": False, "n_window": 64} if kv_mode == "xkv" else None
        settings: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "n_ubatch": 64, **kwargs}
        opened.append(Llama(path, kv_mode=kv_mode, xkv=xkv, verbose=False, **settings))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()


def held(llm: Llama) -> bytes:
    return llm.save_state().llama_state


def go_on(llm: Llama, n: int = 24) -> list[int]:
    """Greedy tokens after one that is the same for all."""
    token, found = 70, []
    for _ in range(n):
        llm.eval([token])
        token = llm.sample(temp=0.0)
        found.append(token)
    return found


def read_on(llm: Llama, tokens: list[int]) -> np.ndarray:
    """Log-probabilities after each of some tokens."""
    rows = []
    for token in tokens:
        llm.eval([token])
        rows.append(log_softmax(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),))))
    return np.array(rows)


def counts(llm: Llama) -> tuple[int, int, int]:
    report = llm.kv_report()
    return llm.n_tokens, report.n_exact, report.n_stored


@pytest.mark.parametrize("mode", ["xkv", "f16"])
def test_a_file(mode: str, open_tiny: Open, tmp_path: Path) -> None:
    llm = open_tiny(kv_mode=mode)
    llm.eval(llm.tokenize(PROMPT.encode()))
    llm.save_file(tmp_path / "a.state", {"note": "ä"})
    before = counts(llm)
    expected = go_on(llm)
    other = open_tiny(kv_mode=mode)
    other.eval([5, 6, 7])
    saved = other.load_file(tmp_path / "a.state")
    assert saved.extra == {"note": "ä"}
    assert counts(other) == before
    assert list(other.eval_tokens) == llm.tokenize(PROMPT.encode())
    assert go_on(other) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]


def test_the_header_names_its_origin(open_tiny: Open, tmp_path: Path) -> None:
    llm = open_tiny()
    llm.eval([5, 6, 7])
    llm.save_file(tmp_path / "a.state")
    origin = states.read_state(tmp_path / "a.state").state.origin
    assert origin == llm.origin
    assert (len(origin.model), origin.sidecar, origin.kv_mode) == (64, None, "xkv")
    assert origin.plan.endswith(f"n_ctx {N_CTX}")


def test_another_n_ctx(open_tiny: Open, tmp_path: Path) -> None:
    """Where there is room; else one line with both numbers."""
    llm = open_tiny()
    tokens = llm.tokenize(PROMPT.encode())
    llm.eval(tokens)
    llm.save_file(tmp_path / "a.state")
    larger = open_tiny(n_ctx=2048)
    larger.load_file(tmp_path / "a.state")
    assert list(larger.eval_tokens) == tokens
    assert sum(counts(larger)[1:]) == len(tokens)
    assert len(go_on(larger)) == 24
    smaller = open_tiny(n_ctx=512)
    smaller.eval([5, 6, 7])
    before = held(smaller)
    with pytest.raises(
        StateError, match=rf"a\.state: {len(tokens)} tokens, this context has room for 512; raise n_ctx"
    ):
        smaller.load_file(tmp_path / "a.state")
    assert held(smaller) == before


def wrong_files(data: bytes) -> list[tuple[bytes, str]]:
    rng = np.random.default_rng(0)
    found = [(data[:n], "no saved state|damaged or cut short") for n in (0, 10, 40, len(data) // 2, len(data) - 1)]
    for at in (20, 21, 23, 24, 30, 60, *rng.integers(56, len(data), 20)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        found.append((bytes(flipped), "damaged"))
    newer = bytearray(data)
    newer[16] = states.VERSION + 1
    return [*found, (bytes(newer), "version 2, expected 1; upgrade xkv-gguf"), (b"GGUF" + data, "no saved state")]


def test_damaged_files(open_tiny: Open, tmp_path: Path) -> None:
    llm = open_tiny()
    llm.eval(llm.tokenize(PROMPT.encode()))
    path = tmp_path / "a.state"
    llm.save_file(path)
    good = path.read_bytes()
    llm.eval([5, 6, 7])
    before = held(llm), list(llm.eval_tokens)
    for data, why in wrong_files(good):
        path.write_bytes(data)
        with pytest.raises(StateError, match=why) as error:
            llm.load_file(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert (held(llm), list(llm.eval_tokens)) == before
    with pytest.raises(StateError, match="cannot be read"):
        llm.load_file(tmp_path / "none")


def test_files_of_others(open_tiny: Open, tmp_path: Path) -> None:
    llm = open_tiny()
    llm.eval([5, 6, 7])
    before = held(llm)
    write_tiny(tmp_path / "other.gguf", weights(1))
    other = open_tiny(tmp_path / "other.gguf")
    other.eval([5, 6, 7, 8])
    foreign = other.save_state()
    of_other_sidecar = llm.save_state()
    of_other_sidecar.origin = replace(llm.origin, sidecar="a" * 64)
    of_f16 = open_tiny(kv_mode="f16").save_state()
    for state, why in (
        (foreign, "saved with model"),
        (of_f16, "saved with kv_mode f16, expected xkv"),
        (of_other_sidecar, "saved with sidecar aaaaaaaaaaaaaaaa .xkv .*, this one is none"),
    ):
        states.write_state(tmp_path / "a.state", state)
        with pytest.raises(StateError, match=why):
            llm.load_file(tmp_path / "a.state")
        with pytest.raises(StateError, match=why):
            llm.load_state(pickle.loads(pickle.dumps(state)))
    # the bytes alone tell it, too
    del foreign.origin
    with pytest.raises(StateError, match="the state was saved with another model than this one"):
        llm.load_state(foreign)
    assert held(llm) == before


@contextmanager
def files_of(room: int) -> Iterator[None]:
    """Within it, files cannot grow beyond some bytes; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:  # before pytest prints, which may be into a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [1, 600])
def test_a_file_is_replaced_when_the_next_one_is_complete(room: int, open_tiny: Open, tmp_path: Path) -> None:
    llm = open_tiny()
    llm.eval([5, 6, 7])
    path = tmp_path / "a.state"
    llm.save_file(path)
    before = path.read_bytes()
    llm.eval([8, 9])
    with files_of(room), pytest.raises(StateError, match=r"a\.state: cannot be written \(File too large\)$"):
        llm.save_file(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"]
    state = llm.save_file(path)
    assert path.read_bytes() != before
    with pytest.raises(StateError, match="cannot be written"):
        states.write_state(tmp_path / "no" / "a.state", state)


def test_a_state_holds_what_is_in_use(open_tiny: Open) -> None:
    """Not what is allocated, and no logits."""
    llm = open_tiny()
    sizes = []
    for n in (100, 500, 1000):
        llm.reset()
        llm.eval([3 + i % 250 for i in range(n)])
        state = llm.save_state()
        sizes.append(len(pickle.dumps(state)))
        assert state.llama_state_size == len(state.llama_state) <= sizes[-1] < state.llama_state_size + 4 * n + 2000
    report = llm.kv_report()
    scratch = sum(part.bytes for part in report.scratch if part.name == "micro-batch in transit")
    assert sizes[0] < sizes[2]
    assert max(sizes) < report.total_bytes + scratch + 100_000


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_caches_of_prompts(kind: str, open_tiny: Open, tmp_path: Path) -> None:
    """A hit goes on with the same greedy text, in the same object and in another one."""
    cache: Any = LlamaRAMCache() if kind == "ram" else LlamaDiskCache(str(tmp_path))
    settings: Any = {"max_tokens": 16, "temperature": 0.0}
    fresh = open_tiny()(PROMPT, **settings)["choices"][0]["text"]
    llm = open_tiny()
    llm.set_cache(cache)
    llm(PROMPT, **settings)
    for one in (llm, open_tiny()):
        one.reset()
        one.set_cache(cache)
        n_read: list[int] = []
        one.on_eval = lambda done, every, n_read=n_read: n_read.append(every)
        assert one(PROMPT, **settings)["choices"][0]["text"] == fresh != ""
        assert n_read[0] == 1


def test_the_capacity_is_in_bytes_of_our_states(open_tiny: Open) -> None:
    llm = open_tiny()
    cache = LlamaRAMCache()
    llm.set_cache(cache)
    for prompt in (PROMPT, PROMPT[::-1]):
        llm(prompt, max_tokens=2, temperature=0.0)
    sizes = [state.llama_state_size for state in cache.cache_state.values()]
    assert cache.cache_size == sum(sizes) == sum(len(s.llama_state) for s in cache.cache_state.values())
    small = LlamaRAMCache(capacity_bytes=sum(sizes) - 1)
    llm.set_cache(small)
    for prompt in (PROMPT, PROMPT[::-1]):
        llm.reset()
        llm(prompt, max_tokens=2, temperature=0.0)
    assert len(small.cache_state) == 1


@pytest.mark.model
@pytest.mark.slow
def test_more_text_after_a_restored_state(demo_model: Path, sidecar: Path, repo_root: Path, tmp_path: Path) -> None:
    """Flushes, changes of stage and renewals go on as they would have; a moved state reads on, too."""
    text = (repo_root / "docs" / "architecture.md").read_text()

    def open_one(n_ctx: int) -> Llama:
        options = {"sidecar": str(sidecar), "ratio": 5}
        return Llama(demo_model, xkv=options, n_ctx=n_ctx, n_ubatch=64, n_threads=2, verbose=False)

    llm = open_one(1536)
    tokens = llm.tokenize(text.encode())[:1332]
    prompt, rest = tokens[:1300], tokens[1300:]
    llm.eval(prompt[:600])
    llm.save_file(tmp_path / "a.state")
    llm.eval(prompt[600:])
    expected = (counts(llm), llm.kv_report().n_check)
    rows = read_on(llm, rest)
    llm.close()
    other = open_one(1536)
    other.load_file(tmp_path / "a.state")
    assert counts(other)[0] == 600
    other.eval(prompt[600:])
    assert (counts(other), other.kv_report().n_check) == expected
    np.testing.assert_array_equal(read_on(other, rest), rows)
    other.close()
    moved = open_one(2048)
    moved.load_file(tmp_path / "a.state")
    moved.eval(prompt[600:])
    assert sum(counts(moved)[1:]) == 1300
    moved_rows = read_on(moved, rest)
    moved.close()
    assert 0.0 < kl_divergence(rows, moved_rows).mean() < 0.05
