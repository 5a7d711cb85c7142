"""Writes a model of a named shape with random weights, for speed, scratch and conversion at widths of large models.

    .venv/bin/python benchmarks/shape.py llama-8b --layers 4 -o wide.gguf --sidecar
    .venv/bin/xkv-gguf bench wide.gguf --caches f16,q4_0,xkv:7 --depths 8192 --n-ctx 32768

    .venv/bin/python benchmarks/shape.py llama-8b --vocab 128256 --hollow -o hollow.gguf
    .venv/bin/xkv-gguf fit hollow.gguf --memory 8GiB

The weights are random blocks of q4_0, or f32, of a size at which activations stay of order 1. The tokenizer knows
bytes; the other tokens are never made from text. What the model says is noise, and so is the quality of any cache of
it.

--sidecar writes MODEL.xkv.gguf beside it, with random orthonormal bases and variances that fall as a power of the
direction's number. The model's own K and V do not follow them, so that bases which follow the prompt are renewed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter, LlamaFileType
from tqdm import tqdm

from xkv_gguf.base.files import check_writable, replacing
from xkv_gguf.base.text import closest, format_bytes
from xkv_gguf.errors import OptionError, XkvError
from xkv_gguf.model.fingerprint import model_fingerprint
from xkv_gguf.plan.groups import GROUP_SIZE, default_frame, group_layers
from xkv_gguf.plan.segments import KINDS
from xkv_gguf.sidecar.info import Calibration, Group, SidecarInfo, sidecar_beside, tensor_name
from xkv_gguf.sidecar.write import write_sidecar

Array = npt.NDArray[Any]

N_CTX = 131072
N_VOCAB = 4096
"""Tokens unless --vocab says otherwise: few, so that logits are a small part of a model with few layers."""
SPECIAL = ("<unk>", "<s>", "</s>")
N_TEXT = len(SPECIAL) + 256
N_SINK = 4
Q4_0 = 32
"""Weights of a block of q4_0: an f16 scale, and 16 bytes of two weights each."""
BLOCK_BYTES = 2 + Q4_0 // 2
SPREAD = (255 / 12) ** 0.5
"""Standard deviation of 0 .. 15, what a weight is in units of its scale."""
BLOCK_ROWS = 256
"""Rows of a basis that are made at once."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `head` is the numbers of a head."""

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    head: int
    n_embd: int
    n_ff: int
    rope_base: float

    @property
    def embd_kv(self) -> int:
        """Numbers of K, and of V, per token and layer."""
        return self.n_head_kv * self.head


SHAPES = {
    "llama-8b": Shape("llama", 32, 32, 8, 128, 4096, 14336, 5e5),
    "llama-7b-mha": Shape("llama", 32, 32, 32, 128, 4096, 11008, 1e4),
    "qwen2.5-14b": Shape("qwen2", 48, 40, 8, 128, 5120, 13824, 1e6),
    "smollm2-135m": Shape("llama", 30, 9, 3, 64, 576, 1536, 1e5),
}
WEIGHTS = ("q4_0", "f32")


def find_shape(name: str) -> Shape:
    """The shape of this name.

    Raises
    ------
    OptionError
        There is none.
    """
    if name not in SHAPES:
        raise OptionError(f"shape {name!r} is unknown{closest(name, SHAPES)}; expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


def tensors(shape: Shape, n_layer: int, n_vocab: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name, in the order of the file: matrices become q4_0, vectors f32."""
    embd, heads, ff = shape.n_embd, shape.n_head * shape.head, shape.n_ff
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (embd,),
        "attn_q.weight": (heads, embd),
        "attn_k.weight": (shape.embd_kv, embd),
        "attn_v.weight": (shape.embd_kv, embd),
        "attn_output.weight": (embd, heads),
        "ffn_norm.weight": (embd,),
        "ffn_gate.weight": (ff, embd),
        "ffn_up.weight": (ff, embd),
        "ffn_down.weight": (embd, ff),
    }
    if shape.arch == "qwen2":
        layer |= {"attn_q.bias": (heads,), "attn_k.bias": (shape.embd_kv,), "attn_v.bias": (shape.embd_kv,)}
    return {
        "token_embd.weight": (n_vocab, embd),
        "output_norm.weight": (embd,),
        "output.weight": (n_vocab, embd),
        **{f"blk.{i}.{name}": size for i in range(n_layer) for name, size in layer.items()},
    }


def random_q4_0(rng: np.random.Generator, rows: int, columns: int, deviation: float) -> Array:
    """Random weights of this standard deviation as the bytes of q4_0, a row of blocks per row."""
    blocks = np.empty((rows, columns // Q4_0, BLOCK_BYTES), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(deviation / SPREAD).tobytes(), np.uint8)
    blocks[..., 2:] = np.frombuffer(rng.bytes(rows * columns // 2), np.uint8).reshape(rows, -1, Q4_0 // 2)
    return blocks.reshape(rows, -1)


def write_model(
    path: Path, name: str, n_layer: int, n_vocab: int, seed: int, weights: str = "q4_0", hollow: bool = False
) -> None:
    """Write the model, one tensor in memory at a time; the file appears when it is complete.

    `weights` are those of matrices: q4_0, or f32, with which activations are not rounded. A hollow model has the header
    alone, and a hole of the weights' size where the file system knows holes.

    Raises
    ------
    OptionError
        The shape is unknown.
    """
    shape = find_shape(name)
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(None, shape.arch)
    _add_fields(writer, shape, f"{name}, random, {n_layer} layers", n_layer, n_vocab, weights)
    todo = tensors(shape, n_layer, n_vocab)
    sizes: dict[str, int] = {}
    for key, size in todo.items():
        if len(size) == 1 or weights == "f32":
            sizes[key] = 4 * int(np.prod(size))
            writer.add_tensor_info(key, size, np.dtype(np.float32), sizes[key])
        else:
            row = size[1] // Q4_0 * BLOCK_BYTES
            sizes[key] = size[0] * row
            writer.add_tensor_info(key, (size[0], row), np.dtype(np.uint8), sizes[key], GGMLQuantizationType.Q4_0)
    try:
        with (
            replacing(path) as temp,
            tqdm(total=sum(sizes.values()), desc="model", unit="B", unit_scale=True, disable=None) as bar,
        ):
            writer.write_header_to_file(temp)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if hollow:
                assert writer.fout is not None
                file = writer.fout[0]
                file.truncate(_padded(file.tell()) + sum(map(_padded, sizes.values())))
                todo = {}
            for key, size in todo.items():
                if len(size) == 1:
                    tensor = np.full(size, 0.0 if key.endswith(".bias") else 1.0, np.float32)
                else:
                    deviation = 1.0 if key == "token_embd.weight" else size[1] ** -0.5
                    if weights == "f32":
                        tensor = rng.standard_normal(size, np.float32) * np.float32(deviation)
                    else:
                        tensor = random_q4_0(rng, size[0], size[1], deviation)
                writer.write_tensor_data(tensor)
                bar.update(sizes[key])
            writer.close()
    finally:
        writer.close()


def _padded(n_byte: int) -> int:
    return -(-n_byte // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _add_fields(writer: GGUFWriter, shape: Shape, title: str, n_layer: int, n_vocab: int, weights: str) -> None:
    writer.add_name(title)
    writer.add_file_type(LlamaFileType.ALL_F32 if weights == "f32" else LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(2)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    spare = [f"<spare {i}>" for i in range(N_TEXT, n_vocab)]
    writer.add_token_list([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *spare])
    writer.add_token_scores([0.0] * n_vocab)
    # unknown, control, byte, unused
    writer.add_token_types([2, 3, 3] + [6] * 256 + [5] * len(spare))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def hadamard(size: int) -> Array:
    """The matrix of 1 and -1 with orthogonal rows for a power of two, int8."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def fill_basis(rng: np.random.Generator, out: Array) -> None:
    """Fill a square matrix with random orthonormal rows, a block of rows at a time.

    They are those of a Hadamard matrix, times a small random rotation for what is no power of two in the size, in
    random order and with random signs of the columns: the work of D^2 instead of D^3. Entries of largest magnitude
    are positive, as the format wants it.
    """
    dim = len(out)
    power = dim & -dim
    rows = hadamard(power)
    small = np.linalg.qr(rng.normal(size=(dim // power, dim // power)))[0] / power**0.5
    signs = rng.choice([-1.0, 1.0], dim).astype(np.float32)
    order = rng.permutation(dim)
    for start in range(0, dim, BLOCK_ROWS):
        at = order[start : start + BLOCK_ROWS]
        block = (small[at // power, :, None] * rows[at % power, None, :]).reshape(len(at), dim).astype(np.float32)
        block *= signs
        largest = np.take_along_axis(block, np.abs(block).argmax(1)[:, None], 1)
        out[start : start + BLOCK_ROWS] = block * np.sign(largest)


def write_random_sidecar(model: Path, name: str, n_layer: int, group_size: int, exponent: float, seed: int) -> Path:
    """Write a sidecar beside a model of this shape; bases wait in a temporary folder, not in memory.

    Returns
    -------
    Path
        The sidecar. Its variances are 1 on average.

    Raises
    ------
    OptionError
        The shape is unknown, or the group size does not fit the number of layers.
    """
    embd = find_shape(name).embd_kv
    groups = tuple(map(Group, group_layers(range(n_layer), group_size)))
    info = SidecarInfo(
        fingerprint=model_fingerprint(model),
        architecture=find_shape(name).arch,
        name=f"{name}, random",
        embd_k=(embd,) * n_layer,
        embd_v=(embd,) * n_layer,
        group_size=group_size,
        frame=default_frame(find_shape(name).head),
        n_sink=N_SINK,
        groups=groups,
        calibration=Calibration("self", 1, seed, 1, "0" * 64),
        settings={"random": True, "exponent": exponent},
    )
    rng = np.random.default_rng(seed)
    path = sidecar_beside(model)
    arrays: dict[str, Array] = {}
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        for g, group in enumerate(tqdm(groups, desc="bases", unit="group", disable=None)):
            dim = len(group.layers) * embd
            spectrum = np.arange(1, dim + 1, dtype=np.float64) ** -exponent
            for kind in KINDS:
                file = Path(folder) / f"{g}{kind}"
                basis = np.memmap(file, np.float16, "w+", shape=(dim, dim))
                fill_basis(rng, basis)
                arrays[tensor_name(g, kind, "basis")] = basis
                arrays[tensor_name(g, kind, "mean")] = np.zeros(dim, np.float32)
                arrays[tensor_name(g, kind, "spectrum")] = (spectrum / spectrum.mean()).astype(np.float32)
        write_sidecar(path, info, arrays)
    return path


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that they are printed like all others."""

    def error(self, message: str) -> Any:
        """Raise what argparse would print below its usage lines."""
        raise OptionError(f"{message} (see --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Write what the arguments say; returns the exit status."""
    parser = Parser(description="Write a model of a named shape with random q4_0 weights.")
    parser.add_argument("shape", metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("-o", "--out", required=True, metavar="MODEL", help="the model to write, such as wide.gguf")
    parser.add_argument("--layers", type=int, metavar="N", help="layers (default: the shape's own)")
    parser.add_argument(
        "--vocab", type=int, default=N_VOCAB, metavar="N", help=f"tokens, {N_TEXT} or more (default: %(default)s)"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="q4_0", help="of matrices (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
    parser.add_argument("--sidecar", action="store_true", help="write MODEL.xkv.gguf with random bases, too")
    parser.add_argument("--hollow", action="store_true", help="write no weights: for xkv-gguf fit, which needs none")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help=f"layers that share bases (default: {GROUP_SIZE}, or all of fewer)"
    )
    parser.add_argument(
        "--exponent", type=float, default=1.5, metavar="X", help="variance of direction i: i^-X (default: %(default)s)"
    )
    try:
        args = parser.parse_args(argv)
        n_layer = find_shape(args.shape).n_layer if args.layers is None else args.layers
        for option, value, least in (
            ("--layers", n_layer, 1),
            ("--vocab", args.vocab, N_TEXT),
            ("--seed", args.seed, 0),
        ):
            if value < least:
                raise OptionError(f"{option}: {value}, expected {least} or more")
        if not 0 <= args.exponent <= 10:
            raise OptionError(f"--exponent: {args.exponent:g}, expected 0 to 10")
        group_size = min(GROUP_SIZE, n_layer) if args.group_size is None else args.group_size
        group_layers(range(n_layer), group_size)
        out = Path(args.out)
        check_writable(out)
        write_model(out, args.shape, n_layer, args.vocab, args.seed, args.weights, args.hollow)
        print(f"{out}: {format_bytes(out.stat().st_size)}")
        if args.sidecar:
            sidecar = write_random_sidecar(out, args.shape, n_layer, group_size, args.exponent, args.seed)
            print(f"{sidecar}: {format_bytes(sidecar.stat().st_size)}")
    except XkvError as error:
        print(f"shape: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
