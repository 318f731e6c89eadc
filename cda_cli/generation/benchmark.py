"""The speed of decoding: time to the first token, tokens a second, and the memory that a step reads.

A step of decoding reads every weight and every cached key and value once, and computes little with each. The bandwidth
of the memory thus bounds its speed, and the figures here stand beside that bound. What a step leaves out, keys by
`KeySelection` and weights by `active_units`, does not count.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from torch import nn

from cda_cli.errors import ConfigError
from cda_cli.generation.decoder import linear_parameters
from cda_cli.generation.generate import Generation
from cda_cli.generation.requests import Request, SamplingSettings
from cda_cli.model import PAGE, KeyReads, KeySelection, Transformer, feed_forward_activation
from cda_cli.plurals import counted

WAVES = 4  # batches that enter one after another; the first one captures CUDA graphs, and is not timed
BANDWIDTH_BYTES = {"cuda": 2**30, "cpu": 2**28}  # of the tensor whose sum is timed
BANDWIDTH_REPEATS = 5


class DecodeSpeed(NamedTuple):
    """The speed of a batch. Times are medians; bytes are those that a step must read, at the mean length."""

    batch_size: int
    prompt_length: int
    new_tokens: int
    time_to_first_token_ms: float  # of the whole batch: kernels are compiled, cache and copied weights are not there
    step_ms: float  # for one token of each row
    tokens_per_second: float  # of the whole batch, without the first token of each row
    step_bytes: int
    bandwidth_gb_per_s: float  # bytes of a step in the time of a step
    bandwidth_utilization: float  # the part of the measured bandwidth
    ceiling_tokens_per_second: float  # at the measured bandwidth
    keys: float | None = None  # of the cache, null keys included, on average over the steps; None: all were read
    keys_read: float | None = None  # of them, by a head for a token
    mass_left_out: float | None = None  # the largest share of a row's weight that was on the others, as a bound
    ff_weights_read: float = 1.0  # the share of the feed-forward's weights that the steps read


def bench_decode(
    model: Transformer,
    dtype: torch.dtype,
    bandwidth: float,
    *,
    batch_size: int = 1,
    prompt_length: int = 128,
    new_tokens: int = 128,
    compiled: bool = False,
    selection: KeySelection | None = None,
) -> DecodeSpeed:
    """Times a `Generation` of random prompts, drawn at temperature 0.8. `bandwidth` is in bytes per second.

    A step reads the keys of `selection`, or all.

    Each row of the batch gets `new_tokens` after a prompt of `prompt_length`. Raises ConfigError if that does not fit
    the context of the model, or leaves no step to time.
    """
    context = model.config.seq_len
    if new_tokens < 2:
        raise ConfigError("--new-tokens must be 2 or more: a prompt gives the first token, and a step each other one")
    if prompt_length + new_tokens > context:
        raise ConfigError(
            f"a prompt of {counted(prompt_length, 'token')} and {counted(new_tokens, 'new token')} exceed the model's "
            f"context of {context}; give a shorter --prompt-length or fewer --new-tokens"
        )

    def arrivals(waves: int, new_tokens: int) -> tuple[list[float], KeyReads | None, float | None]:
        """Seconds from the start until each token of each wave has come to all of its rows, and what was read."""
        requests = _requests(waves * batch_size, prompt_length, new_tokens, model.config.vocab_size)
        _synchronize(model.token_embedding.weight.device)
        began, times = time.perf_counter(), []
        generation = Generation(
            model, requests, batch_size=batch_size, dtype=dtype, compiled=compiled, selection=selection
        )
        for number, _ in enumerate(generation, 1):
            if number % batch_size == 0:
                times.append(time.perf_counter() - began)
        return times, generation.reads(), generation.weights_read()

    times, reads, weights_read = arrivals(WAVES, new_tokens)
    waves = [times[start : start + new_tokens] for start in range(new_tokens, len(times), new_tokens)]
    step = statistics.median((wave[-1] - wave[0]) / (new_tokens - 1) for wave in waves)
    positions = prompt_length + new_tokens / 2
    if reads is not None:  # The bounds of a page are as long as a key and a value, but in float32.
        positions = reads.keys_read - model.config.null_kv + 4 / dtype.itemsize * reads.keys / PAGE
    step_bytes = bytes_of_step(model, dtype, batch_size, positions)
    weights_read = 1.0 if weights_read is None else weights_read
    of_units = model.config.depth * model.config.dim * feed_forward_activation(model.config).total_width
    step_bytes -= int((1 - weights_read) * dtype.itemsize * of_units)
    return DecodeSpeed(
        batch_size,
        prompt_length,
        new_tokens,
        time_to_first_token_ms=1e3 * statistics.median(arrivals(1, 1)[0][0] for _ in range(WAVES - 1)),
        step_ms=1e3 * step,
        tokens_per_second=batch_size / step,
        step_bytes=step_bytes,
        bandwidth_gb_per_s=step_bytes / step / 1e9,
        bandwidth_utilization=step_bytes / step / bandwidth,
        ceiling_tokens_per_second=batch_size * bandwidth / step_bytes,
        **(reads._asdict() if reads is not None else {}),
        ff_weights_read=weights_read,
    )


def bytes_of_step(model: Transformer, dtype: torch.dtype, batch_size: int, length: float) -> int:
    """Returns the bytes that a step reads.

    These are all weights, but of an embedding only a row for each token, and keys and values of `length` positions.
    """
    config = model.config
    matrices = {id(each): each.numel() for each in linear_parameters(model)}
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    others = sum(each.numel() for each in model.parameters() if id(each) not in {*matrices, *embeddings})
    rows = batch_size * config.dim * (1 if model.position_embedding is None else 2)
    cached = 2 * batch_size * config.depth * config.key_heads * config.head_width * (config.null_kv + length)
    return int(dtype.itemsize * (sum(matrices.values()) + cached) + 4 * (others + rows))


def memory_bandwidth(device: torch.device) -> float:
    """Returns the bytes per second at which the sum of a tensor reads it that is larger than every cache, at best."""
    tensor = torch.ones(BANDWIDTH_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(1 + BANDWIDTH_REPEATS):
        _synchronize(device)
        began = time.perf_counter()
        tensor.sum()
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return tensor.nbytes / min(seconds)


def _requests(count: int, prompt_length: int, new_tokens: int, vocab_size: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocab_size, (count, prompt_length), generator=generator).tolist()
    return [Request(prompt, new_tokens, SamplingSettings(), seed) for seed, prompt in enumerate(prompts)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
