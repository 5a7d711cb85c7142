"""A model on llama.cpp with a plain f16 cache, as calibration needs it. All foreign calls of this package are here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xkv_gguf.errors import CalibrationError, ModelError
from xkv_gguf.model.fingerprint import read_model_header
from xkv_gguf.plan.sizes import padded_ctx

if TYPE_CHECKING:
    from xkv_gguf.runtime.native import ScopeParams

N_UBATCH = 512


def _llama_cpp() -> tuple[Any, Any]:
    """llama_cpp on the patched library, and the module that keeps its log off the terminal."""
    from xkv_gguf.runtime import loader

    loader.load()
    import llama_cpp

    from xkv_gguf.runtime import log

    return llama_cpp, log


class Engine:
    """A loaded model and, after `open_context`, one context.

    Parameters
    ----------
    path : Path
        GGUF model; of a split model, its first file.
    n_threads : int
        Threads for computing.

    Raises
    ------
    ModelError
        The file is missing, is not a model, or llama.cpp cannot load it.
    UnsupportedError
        An xkv cache cannot be used with the model.
    LibraryError
        The patched library is not installed properly.
    """

    def __init__(self, path: Path, n_threads: int) -> None:
        read_model_header(path)  # its errors are better than a failed load
        self._lib, self._log = _llama_cpp()
        self._model: Any = None
        self._ctx: Any = None
        self._batch: Any = None
        self.n_threads = n_threads
        with self._log.collect(quiet=True) as errors:
            self._lib.llama_backend_init()
            params = self._lib.llama_model_default_params()
            params.n_gpu_layers = 0
            self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ModelError(
                f"model {path}: llama.cpp cannot load it ({self._log.reason(errors) or 'no reason given'})"
            )
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._recurrent = bool(self._lib.llama_model_is_hybrid(self._model))
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(self._vocab))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free context and model."""
        self.close_context()
        if self._model:
            with self._log.collect(quiet=True):
                self._lib.llama_model_free(self._model)
            self._model = None

    @property
    def model_pointer(self) -> int:
        """Address of the llama_model."""
        return int(self._model)

    @property
    def context_pointer(self) -> int:
        """Address of the llama_context."""
        return int(self._ctx)

    @property
    def n_ctx_train(self) -> int:
        """Context that the model was trained for, in tokens."""
        return int(self._lib.llama_model_n_ctx_train(self._model))

    # ---- text

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text, without a first token added; `special` reads control tokens in it as such."""
        data = text.encode()
        room = len(data) + 8
        for _ in range(2):
            ids = (ctypes.c_int32 * room)()
            n = int(self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, False, special))
            if n >= 0:
                break
            room = -n  # what it takes
        else:
            raise CalibrationError(f"the model's tokenizer failed on a text of {len(data)} bytes")
        return list(ids[:n])

    def bos(self) -> list[int]:
        """The token that every text of this model begins with, or nothing."""
        if not self._lib.llama_vocab_get_add_bos(self._vocab):
            return []
        token = int(self._lib.llama_vocab_bos(self._vocab))
        return [token] if token >= 0 else []

    def is_end(self, token: int) -> bool:
        """Whether a token ends a text."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def control_tokens(self) -> list[int]:
        """Ids of all control tokens."""
        return [i for i in range(self.n_vocab) if self._lib.llama_vocab_is_control(self._vocab, i)]

    def piece(self, tokens: Sequence[int]) -> str:
        """Text of some tokens, control tokens included."""
        buffer = ctypes.create_string_buffer(256)
        data = b""
        for token in tokens:
            n = int(self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True))
            data += buffer.raw[: max(n, 0)]
        return data.decode("utf-8", "replace")

    def chat_prompt(self, request: str) -> str | None:
        """A request in the model's chat format, up to where the answer begins; None if the model has no known one."""
        template = self._lib.llama_model_chat_template(self._model, None)
        if not template:
            return None
        message = (self._lib.llama_chat_message * 1)()
        message[0].role = b"user"
        message[0].content = request.encode()
        buffer = ctypes.create_string_buffer(4096 + 4 * len(request))
        n = int(self._lib.llama_chat_apply_template(template, message, 1, True, buffer, len(buffer)))
        return buffer.raw[:n].decode() if 0 < n <= len(buffer) else None

    # ---- running

    def open_context(self, n_seq: int, n_len: int, xkv: ScopeParams | None = None, n_ubatch: int | None = None) -> None:
        """Make a context for `n_seq` sequences of `n_len` tokens with flash attention.

        Parameters
        ----------
        n_seq, n_len : int
        xkv : ScopeParams, optional
            An xkv cache; None is a plain f16 cache.
        n_ubatch : int, optional
            Tokens of a micro-batch, as many as fit a batch unless given.

        Raises
        ------
        ModelError
            llama.cpp cannot make it.
        """
        self.close_context()
        params = self._lib.llama_context_default_params()
        self._n_seq = n_seq
        n_seq += self._recurrent  # one to branch to
        params.n_ctx = n_seq * padded_ctx(n_len)
        params.n_seq_max = n_seq
        params.n_batch = max(N_UBATCH, n_seq)
        params.n_ubatch = min(n_ubatch or params.n_batch, params.n_batch)
        params.n_threads = params.n_threads_batch = self.n_threads
        params.type_k = params.type_v = self._lib.GGML_TYPE_F16
        params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        params.swa_full = True  # what is cut off must leave no hole in a window
        params.no_perf = True
        from xkv_gguf.runtime import native

        scope = native.scope(xkv) if xkv is not None else nullcontext()
        with scope, self._log.collect(quiet=True) as errors:
            self._ctx = self._lib.llama_init_from_model(self._model, params)
        if not self._ctx:
            reason = (xkv and native.last_error()) or self._log.reason(errors) or "no reason given"
            raise ModelError(f"llama.cpp cannot make a context of {n_seq} x {n_len} tokens ({reason})")
        self.n_batch = int(params.n_batch)
        self._batch = self._lib.llama_batch_init(self.n_batch, 0, 1)

    def close_context(self) -> None:
        """Free the context, if there is one."""
        if self._batch is not None:
            self._lib.llama_batch_free(self._batch)
            self._batch = None
        if self._ctx:
            with self._log.collect(quiet=True):
                self._lib.llama_free(self._ctx)
            self._ctx = None

    def clear(self) -> None:
        """Empty the cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), False)

    @contextmanager
    def branch(self, seq: int, pos: int) -> Iterator[int]:
        """Go on from a sequence's first `pos` tokens, all that it holds, and forget what was added.

        Yields
        ------
        int
            The sequence to go on with: a copy where the model has a recurrent state, which cannot go back.
        """
        memory = self._lib.llama_get_memory(self._ctx)
        if self._recurrent:
            copy = self._n_seq
            self._lib.llama_memory_seq_cp(memory, seq, copy, -1, -1)
            yield copy
            done = self._lib.llama_memory_seq_rm(memory, copy, -1, -1)
        else:
            yield seq
            done = self._lib.llama_memory_seq_rm(memory, seq, pos, -1)
        if not done:
            raise CalibrationError(f"llama.cpp cannot remove tokens from position {pos} on")

    def decode(self, tokens: Sequence[int], seqs: Sequence[int], positions: Sequence[int], outputs: bool) -> None:
        """Run at most `n_batch` tokens; with `outputs`, logits of each are kept for `logits`.

        Raises
        ------
        CalibrationError
            llama.cpp refuses the batch.
        """
        n = len(tokens)
        batch = self._batch
        batch.n_tokens = n
        for i in range(n):
            batch.token[i] = tokens[i]
            batch.pos[i] = positions[i]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seqs[i]
            batch.logits[i] = outputs
        with self._log.collect(quiet=True) as errors:
            status = int(self._lib.llama_decode(self._ctx, batch))
        if status != 0:
            reason = self._log.reason(errors) or f"status {status}"
            raise CalibrationError(f"llama.cpp failed to run {n} tokens of calibration text ({reason})")

    def logits(self, n: int) -> npt.NDArray[np.float32]:
        """Logits of the last batch, shape (n, n_vocab); valid until the next `decode`."""
        pointer = self._lib.llama_get_logits(self._ctx)
        return np.ctypeslib.as_array(pointer, shape=(n, self.n_vocab))
