"""Measures the speed of decoding, beside transformers' `generate` of the same model.

    make bench        on a CPU: preset tiny, also beside the published `generate`
    make bench-gpu    on a GPU: presets seed and small in bf16, one stream and a batch of 64, beside the ceiling

`python benchmarks/decoding.py eager` (or compiled) makes one of the two tables of a GPU. The ceiling is the speed at
which the memory gives what a step must read.

All draw at temperature 0.8, from random prompts and fresh weights. The published `generate` reads its whole window for
each token. Its operator runs on GPUs alone; on a CPU the same package's PyTorch code stands in for it. The package
transformers (the extra `hf`) is left out where it is not installed.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from synthetic import ATTENTION, header, on_gpu, row

from cda_cli.config import resolve
from cda_cli.errors import ConfigError
from cda_cli.generation import SamplingSettings, generate
from cda_cli.generation.benchmark import bench_decode, memory_bandwidth
from cda_cli.model import Transformer

PRESETS = ("seed", "small")
BATCH_SIZES = (1, 64)
LENGTH = 128  # tokens of each prompt, and new ones, on a GPU
NEW_TOKENS = 256  # after a prompt of one token, on a CPU
ROUNDS = 5
TEMPERATURE = 0.8


def main(wanted: Sequence[str]) -> None:
    if not torch.cuda.is_available():
        cpu_table()
        return
    for name in on_gpu(wanted, ("eager", "compiled")):
        gpu_table(torch.device("cuda"), torch.bfloat16, compiled=name == "compiled")


def fresh(preset: str, attention: str, device: torch.device) -> Transformer:
    torch.manual_seed(0)
    return Transformer(resolve(preset=preset, sets=list(ATTENTION[attention])).model).to(device).eval()


def gpu_table(device: torch.device, dtype: torch.dtype, *, compiled: bool) -> None:
    bandwidth = memory_bandwidth(device)
    steps = "compiled steps" if compiled else "steps without torch.compile"
    title = f"Decoding, {LENGTH} tokens after {LENGTH}, bf16, {steps}, memory at {bandwidth / 1e12:.2f} TB/s"
    header(title, "preset, attention, batch", "first token, ms", "cda, tokens/s", "transformers, tokens/s",
           "ceiling, tokens/s", "step, × softmax")  # fmt: skip
    for preset, batch_size in itertools.product(PRESETS, BATCH_SIZES):
        softmax = None
        for attention in ATTENTION:
            model = fresh(preset, attention, device)
            lengths: dict[str, Any] = {"prompt_length": LENGTH, "new_tokens": LENGTH}
            speed = bench_decode(model, dtype, bandwidth, batch_size=batch_size, compiled=compiled, **lengths)
            softmax = softmax or speed.step_ms
            row(
                f"{preset}, {attention}, {batch_size}",
                speed.time_to_first_token_ms,
                f"{speed.tokens_per_second:,.0f}",
                their_tokens_per_second(model, dtype, batch_size),
                f"{speed.ceiling_tokens_per_second:,.0f}",
                f"{speed.step_ms / softmax:.2f}",
            )


def their_tokens_per_second(model: Transformer, dtype: torch.dtype, batch_size: int) -> str:
    """Times transformers' `generate` with a static cache, without the prompt."""
    generate_theirs = transformers_generate(model, dtype)
    if generate_theirs is None:
        return "–"
    prompts = torch.randint(model.config.vocab_size, (batch_size, LENGTH), device=model.token_embedding.weight.device)

    def seconds(new_tokens: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        generate_theirs(prompts, new_tokens, cache_implementation="static")
        torch.cuda.synchronize()
        return time.perf_counter() - began

    try:
        times = [seconds(LENGTH) - seconds(1) for _ in range(3)]
    except Exception as error:  # noqa: BLE001 - another library's limit is a cell of the table
        return type(error).__name__
    return f"{batch_size * (LENGTH - 1) / min(times):,.0f}"


def transformers_generate(model: Transformer, dtype: torch.dtype = torch.float32) -> Callable[..., Any] | None:
    """Returns `generate` of the model as an exported folder has it, or None without transformers."""
    try:
        from cda_cli.interchange.hf import CdaConfig, CdaForCausalLM
    except ConfigError:
        return None
    exported = CdaForCausalLM(CdaConfig(model.config.model_dump())).eval()
    exported.load_state_dict({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    exported = exported.to(model.token_embedding.weight.device, dtype)

    def run(prompts: torch.Tensor, new_tokens: int, **options: Any) -> object:
        drawn = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "pad_token_id": 0}
        return exported.generate(prompts, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **drawn, **options)

    return run


def cpu_table() -> None:
    ways: dict[str, Callable[[], object]] = {}
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    for attention in ATTENTION:
        model = fresh("tiny", attention, torch.device("cpu"))
        ways[f"cda, {attention}"] = lambda model=model: list(  # type: ignore[misc]
            generate(model, [0], NEW_TOKENS, SamplingSettings(TEMPERATURE), seed=0)
        )
        theirs = transformers_generate(model)
        if theirs is not None:
            ways[f"transformers, {attention}"] = partial(theirs, prompt, NEW_TOKENS)
        ways[f"published, {attention}"] = partial(
            published(attention != "softmax").generate, prompt, NEW_TOKENS, temperature=TEMPERATURE, filter_thres=0.0
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS):
        for name, way in ways.items():
            if number > 1 and seconds[name][-1] > 10:
                continue
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    header(f"Decoding, preset tiny, {NEW_TOKENS} tokens after one", "code, attention", "tokens/s", "time, × cda")
    for name, found in seconds.items():
        mine = statistics.median(seconds[f"cda, {name.partition(', ')[2]}"])
        row(name, f"{NEW_TOKENS / statistics.median(found):,.0f}", f"{statistics.median(found) / mine:.2f}")


def published(sparse: bool) -> Any:
    """Returns the published wrapper around its Transformer of the size of preset tiny."""
    import coordinate_descent_attention as package
    from colt5_attention import coor_descent

    code = sys.modules["coordinate_descent_attention.coordinate_descent_attention"]
    code.triton_coor_descent = lambda s, checkpoint_segments, **others: coor_descent(s, **others)  # type: ignore[attr-defined]
    model = resolve(preset="tiny").model
    net = package.Transformer(
        num_tokens=model.vocab_size, dim=model.dim, seq_len=model.seq_len, depth=model.depth, heads=model.heads,
        dim_head=model.head_width, attn_use_coor_descent=sparse, attn_coor_descent_sparsity_k=model.attn_k,
    )  # fmt: skip
    return package.AutoregressiveWrapper(net).eval()


if __name__ == "__main__":
    main(sys.argv[1:])
