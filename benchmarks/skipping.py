"""Measures, for each layer of a trained model, whether leaving out tiles of keys would pay.

    cda train --preset small --set model.seq_len=8192 --set model.attn_eps=0.1 --set model.eps_anneal_start=1 ...
    python benchmarks/skipping.py RUN --data TEXT

A tile of 64 queries × 64 keys (or 128 × 64) can be left out at tolerance τ if no weight in it reaches τ. The table has
the share of such tiles among those that some query sees, for τ = 1e-2 … 1e-5, and the error ‖o − o_τ‖/‖o‖ that leaving
them out would cause. On a GPU it also has the time of the attention on these tensors beside PyTorch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from synthetic import header, row
from torch import Tensor

import cda_cli.model.attention
from cda_cli.ops import soft_topk_attention
from cda_cli.restore import Restored, restore

TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
KEYS = 64
ROWS = 1024  # rows whose dense weights are in memory at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="text, of which the end is read")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    restored = restore(arguments.run, device)
    header("Tiles that a tolerance would skip", "layer", "mean k", "tiles below τ, 64 × 64", "128 × 64", "error",
           "forward / both, ms", "SDPA")  # fmt: skip
    for layer, (query, key, value, k, settings) in enumerate(attention_inputs(restored, arguments.data)):
        shares, errors = skippable(query, key, value, k, settings)
        times = timings(query, key, value, k, settings) if device.type == "cuda" else ("–", "–")
        small, large = (" / ".join(f"{share:.1%}" for share in shares[rows]) for rows in (64, 128))
        worst = " / ".join(f"{error:.0e}" for error in errors)
        row(layer, f"{k.mean().item():.2f}", small, large, worst, *times)


def attention_inputs(restored: Restored, text: Path) -> list[tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]]:
    """Returns query, key, value, k and settings of every layer, for the last full window of `text`."""
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]] = []

    def listening(query: Tensor, key: Tensor, value: Tensor, k: float | Tensor, **settings: Any) -> Any:
        budget = torch.as_tensor(k, device=query.device, dtype=torch.float32).expand(query.shape[:3])
        seen.append((query.detach(), key.detach(), value.detach(), budget.detach(), settings))
        return soft_topk_attention(query, key, value, k, **settings)

    tokens = restored.tokenizer.encode(text.read_text(encoding="utf-8"))[-restored.config.model.seq_len :]
    ids = torch.as_tensor(tokens, dtype=torch.long, device=restored.device)[None]
    vars(cda_cli.model.attention)["soft_topk_attention"] = listening
    with torch.no_grad(), torch.autocast(restored.device.type, torch.bfloat16, enabled=restored.device.type == "cuda"):
        restored.model(ids)
    return seen


def skippable(
    query: Tensor, key: Tensor, value: Tensor, k: Tensor, settings: dict[str, Any]
) -> tuple[dict[int, list[float]], list[float]]:
    """Returns the share of tiles below each tolerance, for each height of a tile, and the errors for 64 queries."""
    maxima: dict[int, list[Tensor]] = {64: [], 128: []}
    lost, norm = torch.zeros(len(TOLERANCES)), 0.0
    for weights, visible, values in dense_weights(query, key, value, k, settings):
        norm += (weights @ values).square().sum().item()
        for rows, found in maxima.items():
            shape = (len(weights) // rows, rows, -1, KEYS)
            largest = weights.view(shape).amax((1, 3))
            found.append(largest[visible.view(shape).any(3).any(1)])
            if rows == 64:
                for place, tolerance in enumerate(TOLERANCES):
                    left_out = (largest < tolerance).repeat_interleave(rows, 0).repeat_interleave(KEYS, 1)
                    lost[place] += ((weights * left_out) @ values).square().sum().item()
    shares = {
        rows: [(torch.cat(found) < tolerance).float().mean().item() for tolerance in TOLERANCES]
        for rows, found in maxima.items()
    }
    return shares, (lost / norm).sqrt().tolist()


def dense_weights(
    query: Tensor, key: Tensor, value: Tensor, k: Tensor, settings: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields for each block of queries its weights [ROWS, S], the keys that it sees, and the values, in float32."""
    query, key, value = query.float(), key.float(), value.float()
    T, S = query.shape[2], key.shape[2]
    _, threshold = soft_topk_attention(query, key, value, k, **settings, return_threshold=True)
    places = torch.arange(S, device=query.device)
    for head in range(query.shape[1]):
        for start in range(0, T, ROWS):
            rows = slice(start, start + ROWS)
            scores = settings["scale"] * query[0, head, rows] @ key[0, head].T
            visible = places <= torch.arange(T, device=query.device)[rows, None] + (S - T)
            weights = ((scores + threshold[0, head, rows, None]) / settings["eps"]).clamp(max=0).exp() * visible
            yield weights, visible, value[0, head]


def timings(query: Tensor, key: Tensor, value: Tensor, k: Tensor, settings: dict[str, Any]) -> tuple[str, str]:
    """Times forward, and forward with backward, of the attention and of PyTorch's default; milliseconds."""
    from gpu import forward_and_both  # beside this file

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return soft_topk_attention(query, key, value, k, **settings)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    forward, both = forward_and_both(ours, [query, key, value])
    dense_forward, dense_both = forward_and_both(dense, [query, key, value])
    return f"{forward:.3f} / {both:.3f}", f"{dense_forward:.3f} / {dense_both:.3f}"


if __name__ == "__main__":
    main()
