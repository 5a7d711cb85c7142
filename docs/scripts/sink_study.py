"""Where in a text the stored keys and values matter: squared gradients of log-probabilities, token by token.

A plain PyTorch forward pass of a GGUF model of the Llama kind. The first `--stored` tokens are what a cache would have
compressed; tokens drawn from the model's own predictions for the rest give gradients of their log-probabilities with
respect to the stored K and V (a Fisher information, by its definition). Printed: what share of it lies on tokens whose
V has less than a given share of the mean energy in some layer, and which tokens have most. docs/architecture.md
reports it.

    python docs/scripts/sink_study.py MODEL.gguf TEXT.txt --stored 2048 --scored 1024
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from torch.nn.functional import log_softmax, scaled_dot_product_attention, silu

from xkv_gguf import Llama

N_SINK = 4
SHARES = (0.05, 0.1, 0.2)


class Model:
    """Weights and sizes of a GGUF model of the Llama kind, in f32."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.w = {
            t.name: torch.tensor(
                np.array(dequantize(t.data, t.tensor_type), np.float32).reshape([int(n) for n in t.shape[::-1]])
            )
            for t in reader.tensors
        }

        def number(key: str, default: Any = None) -> Any:
            field = reader.get_field(f"llama.{key}")
            return default if field is None else field.contents()

        self.n_layer = number("block_count")
        self.n_head = number("attention.head_count")
        self.n_head_kv = number("attention.head_count_kv", self.n_head)
        self.eps = number("attention.layer_norm_rms_epsilon")
        self.rope_base = number("rope.freq_base", 10000.0)
        self.n_embd_head = len(self.w["blk.0.attn_k.weight"]) // self.n_head_kv

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm of x [n, n_embd]."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.w[name]

    def rope(self, x: Tensor) -> Tensor:
        """Rotate pairs (2i, 2i + 1) of x [n, n_head, n_embd_head] by their positions."""
        freq = self.rope_base ** (-torch.arange(0, self.n_embd_head, 2).float() / self.n_embd_head)
        angle = torch.arange(len(x))[:, None, None] * freq
        cos, sin = angle.cos(), angle.sin()
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention of q [n, n_head, n_embd_head] to k and v of fewer heads: [n, n_head * n_embd_head]."""
        k, v = (x.repeat_interleave(self.n_head // self.n_head_kv, 1) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1).flatten(1)

    def run(self, ids: Tensor, n_stored: int, changes: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities after the stored tokens, and V [n_layer, n_stored, n].

        Later tokens see K and V of the stored ones with `changes` added, stored ones see each other as they are.
        """
        w, n = self.w, len(ids)
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        x = w["token_embd.weight"][ids]
        values = []
        for il, (dk, dv) in enumerate(changes):
            h = self.norm(x, f"blk.{il}.attn_norm.weight")
            q, k, v = (
                (h @ w[f"blk.{il}.attn_{name}.weight"].T).view(n, -1, self.n_embd_head) for name in ("q", "k", "v")
            )
            values.append(v[:n_stored].detach().flatten(1))
            q, k = self.rope(q), self.rope(k)
            exact = self.attend(q[:n_stored], k[:n_stored], v[:n_stored], mask[:n_stored, :n_stored])
            pad = torch.zeros_like(k[n_stored:])
            later = self.attend(q[n_stored:], k + torch.cat([dk, pad]), v + torch.cat([dv, pad]), mask[n_stored:])
            x = x + torch.cat([exact, later]) @ w[f"blk.{il}.attn_output.weight"].T
            h = self.norm(x, f"blk.{il}.ffn_norm.weight")
            gate = silu(h @ w[f"blk.{il}.ffn_gate.weight"].T)
            x = x + (gate * (h @ w[f"blk.{il}.ffn_up.weight"].T)) @ w[f"blk.{il}.ffn_down.weight"].T
        out = w.get("output.weight", w["token_embd.weight"])
        return log_softmax(self.norm(x[n_stored:], "output_norm.weight") @ out.T, -1), torch.stack(values)


def squared_gradients(model: Model, ids: Tensor, n_stored: int, n_draw: int) -> tuple[Tensor, Tensor, Tensor]:
    """By stored token: squared gradients with respect to K and to V, and V's least energy over its mean in a layer."""
    total = [torch.zeros(n_stored), torch.zeros(n_stored)]
    for seed in range(n_draw):
        shape = (n_stored, model.n_head_kv, model.n_embd_head)
        changes = [
            (torch.zeros(shape, requires_grad=True), torch.zeros(shape, requires_grad=True))
            for _ in range(model.n_layer)
        ]
        logp, values = model.run(ids, n_stored, changes)
        drawn = torch.multinomial(logp.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
        for i in range(2):
            wanted = [pair[i] for pair in changes]
            for gradient in torch.autograd.grad(logp.gather(1, drawn).sum(), wanted, retain_graph=i == 0):
                total[i] += gradient.pow(2).sum((1, 2))
    energy = values.pow(2).sum(2)
    return total[0], total[1], (energy / energy.mean(1, keepdim=True)).amin(0)


def main() -> None:
    """Print the shares for each text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--stored", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=3)
    args = parser.parse_args()

    model = Model(args.model)
    llm = Llama(str(args.model), n_ctx=512, kv_mode="f16", verbose=False)
    for text in args.texts:
        ids = llm.tokenize(text.read_bytes())[: args.stored + args.scored]
        k, v, energy = (x[N_SINK:] for x in squared_gradients(model, torch.tensor(ids), args.stored, args.draws))
        print(f"{text.name}: {args.stored} tokens stored, {len(ids) - args.stored} scored")
        for share in SHARES:
            low = energy < share
            of_k, of_v = (100 * x[low].sum() / x.sum() for x in (k, v))
            print(
                f"  V below {share} of the mean energy in some layer: {int(low.sum())} tokens, "
                f"{of_v:.0f} % of V's squared gradient, {of_k:.0f} % of K's"
            )
        for i in v.topk(8).indices.tolist():
            around = llm.detokenize(ids[i + N_SINK - 3 : i + N_SINK + 1]).decode(errors="replace")
            print(f"  {i + N_SINK}: {100 * v[i] / v.sum():.0f} % of V's, {around!r}")


if __name__ == "__main__":
    main()
