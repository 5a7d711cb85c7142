"""The features of `llama_cpp.Llama` on every cache, with the demo model."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaDiskCache, LlamaRAMCache
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from xkv_gguf import Llama
from xkv_gguf.lab.haystack import paragraphs

from .conftest import Open
from .tiny_models import write_adapter

pytestmark = pytest.mark.model

MODES = ["xkv", "f16", "q8_0", "q4_0"]
XKV_AND_PLAIN = ["xkv", "f16"]  # the other types are slow, and take the same paths as f16
FACT = "The ferry to Harlow leaves at seven."
TEXT = FACT + "\n\n" + "\n\n".join(itertools.islice(paragraphs(11), 3))
QUESTION = "When does the ferry to Harlow leave?"


def messages(question: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": f"{TEXT}\n\n{question}"}]


def greedy(llm: Llama, question: str = QUESTION, n: int = 24) -> str:
    reply = llm.create_chat_completion(messages(question), temperature=0.0, max_tokens=n)
    return str(reply["choices"][0]["message"]["content"])


def count_evaluated(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of tokens of each evaluation."""
    counts: list[int] = []
    plain = llm.eval

    def counting(tokens: Any) -> None:
        counts.append(len(tokens))
        plain(tokens)

    monkeypatch.setattr(llm, "eval", counting)
    return counts


@pytest.mark.parametrize("mode", MODES)
def test_chat_answers_from_a_text_and_streams_the_same(mode: str, open_llama: Open) -> None:
    llm = open_llama(mode)
    answer = greedy(llm)
    assert "seven" in answer.lower()
    chunks = open_llama(mode).create_chat_completion(messages(), temperature=0.0, max_tokens=24, stream=True)
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(pieces) == answer
    assert len([piece for piece in pieces if piece]) > 5


@pytest.mark.parametrize("mode", MODES)
def test_completion_counts_its_tokens(mode: str, open_llama: Open) -> None:
    reply: Any = open_llama(mode)(f"{TEXT}\n\nThe ferry to Harlow leaves at", temperature=0.0, max_tokens=4)
    assert "seven" in reply["choices"][0]["text"]
    assert reply["usage"]["completion_tokens"] == 4
    assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("mode", MODES)
def test_the_report_accounts_for_all_tokens_and_bytes(mode: str, open_llama: Open) -> None:
    llm = open_llama(mode)
    before = llm.kv_report()
    assert (before.kv_mode, before.n_ctx, before.n_exact, before.n_stored) == (mode, 1024, 0, 0)
    assert before.total_bytes == sum(part.bytes for part in before.parts) > 0
    greedy(llm)
    after = llm.kv_report()
    assert after.n_exact + after.n_stored == llm.n_tokens
    # allocated at the start, whatever is in it; scratch memory may come with the first compression
    assert [part.name for part in after.parts] == [part.name for part in before.parts]
    assert before.total_bytes <= after.total_bytes < 1.1 * before.total_bytes
    assert (after.n_stored > 100) == (mode == "xkv")


def test_plain_caches_have_the_size_that_their_types_give(open_llama: Open) -> None:
    # 30 layers, K and V, 3 heads of 64 numbers
    numbers = 1024 * 30 * 2 * 3 * 64
    sizes = {mode: open_llama(mode).kv_report().total_bytes for mode in ("f16", "q8_0", "q4_0")}
    assert sizes == {"f16": 2 * numbers, "q8_0": numbers * 34 // 32, "q4_0": numbers * 18 // 32}


@pytest.mark.parametrize("mode", XKV_AND_PLAIN)
def test_a_second_question_reuses_the_text(mode: str, open_llama: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_llama(mode)
    greedy(llm, "Say hello.")
    n_first = llm.n_prompt_tokens
    counts = count_evaluated(llm, monkeypatch)
    assert "seven" in greedy(llm).lower()
    assert counts[0] < 40 < n_first
    if mode == "f16":
        monkeypatch.undo()
        assert greedy(llm) == greedy(open_llama(mode))


@pytest.mark.parametrize("mode", XKV_AND_PLAIN)
def test_an_answer_can_be_generated_again(mode: str, open_llama: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_llama(mode)
    first = greedy(llm, n=80)
    held = llm.n_tokens
    counts = count_evaluated(llm, monkeypatch)
    again = greedy(llm, n=80)
    assert counts[0] == 1
    assert llm.n_tokens == held
    assert llm.kv_report().n_exact + llm.kv_report().n_stored == held
    assert again[:20] == first[:20]


@pytest.mark.parametrize("mode", XKV_AND_PLAIN)
def test_another_prompt_starts_afresh(mode: str, open_llama: Open) -> None:
    llm = open_llama(mode)
    greedy(llm)
    prompt: Any = {"prompt": "The capital of France is", "temperature": 0.0, "max_tokens": 8}
    reply: Any = llm(**prompt)
    fresh: Any = open_llama(mode)(**prompt)
    assert reply["choices"][0]["text"] == fresh["choices"][0]["text"]
    assert "Paris" in reply["choices"][0]["text"]


@pytest.mark.parametrize("mode", XKV_AND_PLAIN)
def test_logits_of_all_tokens(mode: str, open_llama: Open) -> None:
    llm = open_llama(mode, logits_all=True)
    tokens = llm.tokenize(TEXT.encode(), add_bos=False)
    llm.eval(tokens)
    assert llm.scores.shape == (1024, llm.n_vocab())
    logprobs = llm.logits_to_logprobs(llm.scores[: len(tokens) - 1])
    # the text was read, not guessed: chance is -10.8
    assert logprobs[np.arange(len(tokens) - 1), tokens[1:]].mean() > -4.5


@pytest.mark.parametrize("mode", XKV_AND_PLAIN)
def test_log_probabilities_of_an_answer(mode: str, open_llama: Open) -> None:
    llm = open_llama(mode, logits_all=True)
    reply: Any = llm("The capital of France is", max_tokens=3, temperature=0.0, logprobs=2)
    shown = reply["choices"][0]["logprobs"]
    assert shown["tokens"][0] == " Paris"
    assert all(-8.0 < value <= 0.0 for value in shown["token_logprobs"])
    assert [len(top) for top in shown["top_logprobs"]] in ([2, 2, 2], [3, 3, 3])


def test_logits_on_xkv_are_near_those_of_f16(open_llama: Open) -> None:
    tokens = open_llama("f16").tokenize(TEXT.encode())
    scores = {}
    for mode in ("f16", "xkv"):
        llm = open_llama(mode, logits_all=True)
        llm.eval(tokens)
        scores[mode] = llm.scores[: llm.n_tokens].astype(np.float64)
    same = (scores["f16"].argmax(axis=1) == scores["xkv"].argmax(axis=1)).mean()
    assert same > 0.9


@pytest.mark.parametrize("mode", XKV_AND_PLAIN)
def test_drafted_tokens_change_nothing(mode: str, open_llama: Open) -> None:
    question = "Repeat the first paragraph."
    plain = greedy(open_llama(mode), question, n=24)
    draft = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=6)
    drafted = greedy(open_llama(mode, draft_model=draft), question, n=24)
    # batches of other sizes round otherwise, so that a later token may fall differently
    assert drafted[:40] == plain[:40]


@pytest.mark.parametrize("mode", XKV_AND_PLAIN)
def test_a_context_can_be_filled_to_its_last_token(mode: str, open_llama: Open) -> None:
    llm = open_llama(mode, n_ctx=512)
    tokens = (llm.tokenize(TEXT.encode()) * 3)[:500]
    reply: Any = llm.create_completion(tokens, max_tokens=None, temperature=1.0, seed=1, logit_bias={2: -1e9, 0: -1e9})
    assert reply["usage"]["total_tokens"] == 512
    assert reply["choices"][0]["finish_reason"] == "length"
    # and it works on after that
    again: Any = llm.create_completion(tokens[:400], max_tokens=3, temperature=0.0)
    assert again["usage"]["completion_tokens"] == 3


def test_n_ctx_is_rounded_up_and_usable_to_its_end(open_llama: Open) -> None:
    llm = open_llama("f16", n_ctx=300)
    assert llm.n_ctx() == 512
    llm.eval([1] * 400)
    assert llm.n_tokens == 400


def test_the_context_is_4096_unless_given(demo_model: Any) -> None:
    llm = Llama(demo_model, kv_mode="f16", verbose=False)
    assert llm.n_ctx() == 4096
    llm.close()
    llm = Llama(demo_model, kv_mode="f16", n_ctx=0, verbose=False)
    assert llm.n_ctx() == 8192
    llm.close()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot confine a process")
def test_threads_are_those_that_the_process_may_use(demo_model: Path) -> None:
    code = (
        "import os, sys; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); from xkv_gguf import Llama;"
        "llm = Llama(sys.argv[1], kv_mode='f16', n_ctx=256, verbose=False); print(llm.n_threads, llm.n_threads_batch)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, demo_model], capture_output=True, text=True, check=True)
    assert done.stdout == "1 1\n"


def test_reading_tells_how_far_it_is(open_llama: Open) -> None:
    llm = open_llama("xkv", n_batch=100)
    seen: list[tuple[int, int]] = []
    llm.on_eval = lambda n_done, n_all: seen.append((n_done, n_all))
    llm.eval([1] * 250)
    assert seen == [(100, 250), (200, 250), (250, 250)]
    assert llm.n_tokens == 250


@pytest.mark.parametrize("mode", XKV_AND_PLAIN)
def test_nothing_to_read_cuts_what_is_beyond(mode: str, open_llama: Open) -> None:
    llm = open_llama(mode)
    llm.eval([1] * 20)
    llm.n_tokens = 5
    llm.eval([])
    assert llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0) == 4


@pytest.mark.parametrize("mode", XKV_AND_PLAIN)
def test_an_adapter_takes_part(mode: str, open_llama: Open, tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    write_adapter(path, "llama", 576)
    prompt = "The capital of France is"
    texts = []
    for scale in (None, 0.0, 1.0):
        adapter = {} if scale is None else {"lora_path": str(path), "lora_scale": scale}
        reply: Any = open_llama(mode, **adapter)(prompt, temperature=0.0, max_tokens=6)
        texts.append(reply["choices"][0]["text"])
    assert texts[1] == texts[0] != texts[2]


@pytest.mark.parametrize("ratio", [3, 6, 10])
def test_a_ratio_counts_all_bytes(ratio: float, demo_model: Path, sidecar: Path) -> None:
    options = {"sidecar": str(sidecar), "ratio": ratio}
    llm = Llama(demo_model, xkv=options, n_ctx=8192, n_threads=2, verbose=False)
    plain = 2 * 8192 * 30 * 2 * 3 * 64
    assert llm.xkv_plan is not None and llm.xkv_plan.layout.n_ubatch == llm.context_params.n_ubatch
    # buffers are padded
    assert 0.99 * ratio <= plain / llm.kv_report().total_bytes < 1.03 * ratio
    llm.close()


def test_a_budget_is_kept(open_llama: Open) -> None:
    llm = open_llama("xkv", n_ctx=8192, xkv={"budget": "26MiB", "n_window": None})
    assert llm.kv_report().total_bytes <= 26.1 * 2**20


def test_a_given_micro_batch_wins(open_llama: Open) -> None:
    llm = open_llama("xkv", n_ctx=4096, n_ubatch=96, xkv={"ratio": 3})
    assert llm.context_params.n_ubatch == 96


def test_qualities_differ_in_size(open_llama: Open) -> None:
    sizes = [
        open_llama("xkv", n_ctx=4096, xkv={"quality": q}).kv_report().total_bytes for q in ("high", "medium", "low")
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_coefficient_types_change_the_size(open_llama: Open) -> None:
    sizes = [
        open_llama("xkv", n_ctx=4096, xkv={"rank": 128, "types": t}).kv_report().total_bytes
        for t in ("f32", "f16", "q8_0", "q5_0", "q4_0", "q2_0")
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_it_works_without_calibration(demo_model: Path) -> None:
    options = {"calibrate": False, "n_window": 64, "stages": False}
    llm = Llama(demo_model, xkv=options, n_ctx=1024, n_ubatch=64, n_threads=2, verbose=False)
    try:
        assert "seven" in greedy(llm).lower()
        assert llm.kv_report().n_stored > 100
        assert llm.kv_report().n_update >= 1
    finally:
        llm.close()


def test_bases_that_stay_are_not_renewed(open_llama: Open) -> None:
    llm = open_llama("xkv", xkv={"online": False})
    greedy(llm)
    assert llm.kv_report().n_update == 0


@pytest.mark.parametrize("mode", ["xkv", "q8_0"])
def test_a_model_can_be_pickled(mode: str, open_llama: Open) -> None:
    llm = open_llama(mode)
    copy = pickle.loads(pickle.dumps(llm))
    try:
        assert copy.kv_mode == mode
        assert copy.kv_report() == llm.kv_report()
        assert copy.xkv_options == llm.xkv_options
        assert copy.xkv_plan == llm.xkv_plan
    finally:
        copy.close()


@pytest.mark.parametrize("mode", MODES)
def test_states(mode: str, open_llama: Open) -> None:
    """Saved, pickled, and loaded into another object, which goes on with the same tokens."""
    llm, other = open_llama(mode), open_llama(mode)
    first = greedy(llm)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    other("Something else", max_tokens=1)
    other.load_state(state)
    assert other.n_tokens == state.n_tokens == llm.n_tokens
    counts = [llm.kv_report().n_exact, llm.kv_report().n_stored]
    assert [other.kv_report().n_exact, other.kv_report().n_stored] == counts
    more = [llm.tokenize(b" And when does it come back?", add_bos=False) for _ in range(2)]
    for one, tokens in zip((llm, other), more, strict=True):
        for _ in range(8):
            one.eval(tokens)
            tokens = [one.sample(temp=0.0)]
    assert list(other.eval_tokens) == list(llm.eval_tokens)
    assert greedy(other) == first


def test_prompts_are_kept_in_a_cache(open_llama: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Llama-cpp-python's caches of states, in memory and on disk: a prompt is read once."""
    for cache in (LlamaRAMCache(), LlamaDiskCache(str(tmp_path))):
        llm = open_llama("xkv")
        llm.set_cache(cache)
        assert "seven" in greedy(llm).lower()
        llm("Something else", max_tokens=1)
        counts = count_evaluated(llm, monkeypatch)
        assert "seven" in greedy(llm).lower()
        assert sum(counts) < 40


def test_embeddings_work_on_a_plain_cache(open_llama: Open) -> None:
    llm = open_llama("f16", embedding=True, pooling_type=1)
    cat, kitten, tax = (np.array(llm.embed(text, normalize=True)) for text in ("a cat", "a kitten", "tax law of 1954"))
    assert cat.shape == (576,)
    assert cat @ kitten > cat @ tax
