"""Measures decoding that reads only the weights of feed-forward units that are not 0.

    python benchmarks/active_units.py              presets small and base: on a CPU some minutes, on a GPU one
    python benchmarks/active_units.py small        one of them

The weights are fresh. A shift of the biases makes the wanted share of units other than 0, as training does (9.5 % with
relu2 in preset small); a router gets larger weights, so that it decides. A gated layer has as many weights as the
others.

On a CPU the two ways take turns, token by token, in float32 with a single row, after a prompt of 128 tokens. All times
are medians; the last one is that of the quotients of neighbouring steps, which share what else the machine does. On a
GPU, whose blocks of units alone can be left out, texts are generated as `cda bench-decode` does it, in bf16.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from synthetic import header, row
from torch import Tensor, nn

from cda_cli.config import resolve
from cda_cli.generation.benchmark import bench_decode, memory_bandwidth
from cda_cli.model import StaticCache, Transformer, active_units, reading_active_units, weights_read
from cda_cli.ops import Backend

PRESETS = ("small", "base")
PROMPT, STEPS = 128, 64
ROUTER_SCALE = 8.0
SHARES = (0.16, 0.10, 0.05)  # The first is that of 5 of 32 blocks.
# Each with its settings, by the preset's 32 or 48 blocks for the k of a router.
KINDS: dict[str, tuple[str, ...]] = {
    "relu2": (),
    "reglu": ("model.ff_mult=2.6666667",),
    "blocks": ("model.ff_eps=0.05",),
    "hard-topk-blocks": (),
    "sigmoid-topk-blocks": (),
}
BATCH_SIZES = (1, 8, 16)  # on a GPU
# On a GPU; what others are compared with comes first.
GPU_KINDS = ("relu2", "gelu", "blocks", "hard-topk-blocks", "sigmoid-topk-blocks")


def main(wanted: Sequence[str]) -> None:
    if torch.cuda.is_available():
        gpu_table(wanted or PRESETS, torch.device("cuda"))
        return
    header(f"Decoding with few active units, float32, one row, {torch.get_num_threads()} threads",
           "preset, feed-forward", "units other than 0", "weights of the feed-forward read",
           "step, all weights, ms", "step, ms", "times as fast")  # fmt: skip
    for preset in wanted or PRESETS:
        for kind in KINDS:
            for share in SHARES:
                measure(preset, kind, share)


def gpu_table(presets: Sequence[str], device: torch.device) -> None:
    share, bandwidth = SHARES[0], memory_bandwidth(device)
    header(f"Decoding with few active blocks of units, {STEPS} tokens after {PROMPT}, bf16",
           "preset, feed-forward, rows", "units other than 0", "weights of the feed-forward read", "step, ms",
           "tokens/s", f"tokens/s, × {GPU_KINDS[0]}")  # fmt: skip
    few = active_units.MOST_ROWS
    for preset in presets:
        dense: dict[int, float] = {}
        for kind in GPU_KINDS:
            model, _, found = prepared(preset, kind, share, device)
            for rows, reads_all in itertools.product(BATCH_SIZES, (True, False) if "blocks" in kind else (True,)):
                active_units.MOST_ROWS = 0 if reads_all else few
                speed = bench_decode(
                    model, torch.bfloat16, bandwidth, batch_size=rows, prompt_length=PROMPT, new_tokens=STEPS
                )
                against = speed.tokens_per_second / dense.setdefault(rows, speed.tokens_per_second)
                row(f"{preset}, {kind}, {rows}", f"{found:.1%}", f"{speed.ff_weights_read:.1%}", speed.step_ms,
                    f"{speed.tokens_per_second:,.0f}", f"{against:.2f}")  # fmt: skip
    active_units.MOST_ROWS = few


@torch.inference_mode()
def measure(preset: str, kind: str, share: float) -> None:
    model, tokens, found = prepared(preset, kind, share, torch.device("cpu"))
    ways = {"all": model, "active": reading_active_units(model)}
    caches, seconds = {}, {name: [] for name in ways}  # type: ignore[var-annotated]
    for name, way in ways.items():
        caches[name] = StaticCache(way, 1, torch.float32, PROMPT + STEPS)
        way(tokens[:, :PROMPT], caches[name].rows(slice(0, 1), 0))
    for position in range(PROMPT, PROMPT + STEPS):
        for name, way in ways.items():
            began = time.perf_counter()
            way(tokens[:, position : position + 1], caches[name].rows(slice(0, 1), position))
            seconds[name].append(time.perf_counter() - began)
    every, active = (1e3 * statistics.median(seconds[name]) for name in ways)
    faster = statistics.median(one / other for one, other in zip(*seconds.values(), strict=True))
    read = weights_read(ways["active"])
    row(f"{preset}, {kind}", f"{found:.1%}", f"{read:.1%}", every, active, f"{faster:.2f}")


@torch.inference_mode()
def prepared(preset: str, kind: str, share: float, device: torch.device) -> tuple[Transformer, Tensor, float]:
    """A model with fresh weights of which `share` of the units is active, a text, and the share of units that is."""
    torch.manual_seed(0)
    config = resolve(preset=preset, sets=[f"model.ff={kind}", *KINDS.get(kind, ())]).model
    blocks = config.ff_units // config.ff_block_size
    backend: Backend = "triton" if device.type == "cuda" else "auto"
    model = Transformer(config.model_copy(update={"ff_k": max(1.0, round(share * blocks))}), backend).eval()
    tokens = torch.randint(config.vocab_size, (1, PROMPT + STEPS)).to(device)
    return model, tokens, with_active_share(model.to(device), share, tokens)


def with_active_share(model: Transformer, share: float, tokens: Tensor) -> float:
    """Shifts the biases so that `share` of the units is above 0, and returns the share of units that are not 0."""
    shares: list[float] = []

    def shift(linear: nn.Linear, inputs: object, output: Tensor) -> Tensor:
        least = output.flatten().sort().values[int((1 - share) * output.numel())]
        linear.bias.sub_(least)
        return output - least

    def count(projection: nn.Module, inputs: tuple[Tensor]) -> None:
        shares.append((inputs[0] != 0).float().mean().item())

    hooks = []
    for block in model.each_block():
        layer = block.feed_forward
        if layer.activation.block_size is None:
            hooks.append((layer.proj_gate or layer.proj_in).register_forward_hook(shift))
        elif layer.proj_gate is not None:
            layer.proj_gate.weight.mul_(ROUTER_SCALE)
        hooks.append(layer.proj_out.register_forward_pre_hook(count))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return statistics.mean(shares)


if __name__ == "__main__":
    main(sys.argv[1:])
