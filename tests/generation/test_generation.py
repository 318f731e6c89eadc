"""The tokens that follow a prompt: which they are, how many, and that nothing around them changes them."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist

from cda_cli.config import ModelConfig, parse
from cda_cli.errors import ConfigError
from cda_cli.generation import Generation, Request, SamplingSettings, filtered_distribution, generate
from cda_cli.model import StaticCache, Transformer
from cda_cli.training.distributed.launch import Mesh, Place
from cda_cli.training.distributed.processes import Processes

GREEDY = SamplingSettings(temperature=0.0)
WARM = SamplingSettings(temperature=1.0)
OPTIONS: list[dict[str, Any]] = [
    {"attention": "softmax", "ff": "blocks", "ff_k": 1.0, "ff_eps": 0.02, "ff_block_size": 4},
    {"attention": "coordinate-descent", "learned_k": True, "null_kv": 1, "position": "rotary", "qk_norm": True},
    {"attention": "coordinate-descent", "solver": "iterative", "ff": "coordinate-descent", "ff_k": 4.0},
]


def build(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "seq_len": 10, "dim": 16, "depth": 2, "heads": 2, "ff_mult": 2.0, "attn_eps": 0.5}
    model = Transformer(ModelConfig(**sizes | changes)).eval()
    torch.nn.init.normal_(model.to_logits.weight, std=0.6)
    return model


def tokens(model: Transformer, prompt: list[int], count: int, how: SamplingSettings, **changes: Any) -> list[int]:
    return list(generate(model, prompt, count, how, **{"seed": 0} | changes))


def windows(prompt: list[int], drawn: list[int], context: int) -> list[list[int]]:
    """Returns what the model reads before each draw.

    That is everything, or from the moment when the context was last full its newer half and what followed.
    """
    seen, start, read = list(prompt), 0, []
    for token in drawn:
        if len(seen) - start > context:
            start = len(seen) - context // 2
        read.append(seen[start:])
        seen.append(token)
    return read


@torch.no_grad()
def uncached(model: Transformer, prompt: list[int], count: int, how: SamplingSettings, seed: int = 0) -> list[int]:
    """Computes the tokens without a cache: the model reads its whole window again for each."""
    drawn: list[int] = []
    uniforms = np.random.Philox(key=seed).random_raw(count) / 2.0**64
    for uniform in uniforms:
        window = windows(prompt, [*drawn, 0], model.config.seq_len)[-1]
        logits = model(torch.tensor([window]))[0, -1]
        if how.temperature == 0:
            drawn.append(int(logits.argmax()))
        else:
            drawn.append(int((filtered_distribution(logits, how).double().cumsum(0) > uniform).int().argmax()))
    return drawn


@pytest.mark.parametrize("device", ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
def test_each_device_gives_the_tokens_of_whole_passes(device: str) -> None:
    """A GPU need not be the current one. Its steps are CUDA graphs from the second one on."""
    model = build(**OPTIONS[1])
    expected = uncached(model, [1, 2, 3], 20, GREEDY)
    assert tokens(model.to(device), [1, 2, 3], 20, GREEDY) == expected


def test_the_seed_decides() -> None:
    model = build()
    drawn = [tokens(model, [1, 2, 3], 20, WARM, seed=seed) for seed in range(6)]
    assert tokens(model, [1, 2, 3], 20, WARM, seed=3) == drawn[3]
    assert len({tuple(each) for each in drawn}) == 6, "other seeds, the same text"


def test_nothing_else_decides_and_nothing_else_is_changed() -> None:
    """Dropout's generator stays as it is, since the exact resumption of a run rests on it."""
    model = build()
    torch.manual_seed(1)
    first = tokens(model, [1], 20, WARM)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert tokens(model, [1], 20, WARM) == first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", [GREEDY, WARM, SamplingSettings(0.9, top_k=9, top_p=0.9, min_p=0.02)], ids=str)
def test_the_cache_does_not_show_far_past_the_context(options: dict[str, Any], how: SamplingSettings) -> None:
    model = build(**options)
    assert tokens(model, [5, 6, 7], 45, how, seed=4) == uncached(model, [5, 6, 7], 45, how, seed=4)


@settings(max_examples=25)
@given(context=st.integers(2, 9), length=st.integers(1, 9), count=st.integers(0, 30), seed=st.integers(0, 99))
def test_any_context_any_prompt_any_length(context: int, length: int, count: int, seed: int) -> None:
    """The smallest context has two tokens, where half of it is one."""
    model = build(seq_len=context)
    prompt = [(7 * place) % 31 for place in range(min(length, context))]
    found = tokens(model, prompt, count, WARM, seed=seed)
    assert len(found) == count
    assert found == uncached(model, prompt, count, WARM, seed=seed)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_temperature_0_is_the_likeliest_token(options: dict[str, Any]) -> None:
    model = build(**options)
    drawn = tokens(model, [3, 1, 4], 40, GREEDY)
    assert drawn == tokens(model, [3, 1, 4], 40, GREEDY, seed=99), "the seed matters where nothing is drawn"
    for read, token in zip(windows([3, 1, 4], drawn, 10), drawn, strict=True):
        assert model(torch.tensor([read]))[0, -1].argmax() == token


@torch.no_grad()
def test_tokens_are_drawn_from_the_filtered_distribution() -> None:
    """A filtered token never comes, and the others come about as often as their shares say."""
    model, how = build(), SamplingSettings(1.3, top_k=6, top_p=0.9)
    shares = filtered_distribution(model(torch.tensor([[8, 9]]))[0, -1], how)
    count = 600
    drawn = torch.tensor([tokens(model, [8, 9], 1, how, seed=seed)[0] for seed in range(count)])
    found = drawn.bincount(minlength=31) / count
    assert (shares > 0).sum() >= 3
    assert not found[shares == 0].any(), "a token was drawn that the filters take away"
    assert ((found - shares).abs() <= 5 * (shares * (1 - shares) / count).sqrt()).all()


@torch.no_grad()
@settings(max_examples=8)
@given(
    repetition=st.sampled_from([1.0, 0.6, 1.7, 5.0]), presence=st.sampled_from([0.0, -0.9, 0.7, 4.0]),
    prompt=st.lists(st.integers(0, 30), min_size=1, max_size=9),
)  # fmt: skip
def test_penalties_change_the_logits_as_they_are_defined(repetition: float, presence: float, prompt: list[int]) -> None:
    """The text that is penalised is all of it, also where the model no longer sees its beginning."""
    model, how = build(), SamplingSettings(0.0, repetition_penalty=repetition, presence_penalty=presence)
    drawn = tokens(model, prompt, 25, how)
    for place, read in enumerate(windows(prompt, drawn, 10)):
        logits = model(torch.tensor([read]))[0, -1]
        for token in {*prompt, *drawn[:place]}:
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token in set(drawn[:place]):
            logits[token] -= presence
        assert logits[drawn[place]] >= logits.max() - 1e-5


def test_a_separator_ends_the_text_and_is_not_part_of_it() -> None:
    model = build()
    free = tokens(model, [1, 2], 30, WARM)
    for separator in set(free):
        expected = free[: free.index(separator)]
        assert tokens(model, [1, 2], 30, WARM, separator=separator) == expected
    absent = next(token for token in range(31) if token not in free)
    assert tokens(model, [1, 2], 30, WARM, separator=absent) == free
    with_zero = next(seed for seed in range(99) if 0 in tokens(model, [1, 2], 30, WARM, seed=seed))
    assert 0 not in tokens(model, [1, 2], 30, WARM, seed=with_zero, separator=0), "token 0 is taken for no separator"


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 25])
def test_there_are_at_most_as_many_as_asked_for(count: int) -> None:
    """The numbers lie below the context, at it and above it. Each token is one pass of the model, and no more."""
    model, passes = build(), []
    model.register_forward_hook(lambda module, args, out: passes.append(args[0].shape))
    assert len(tokens(model, [1, 2], count, WARM)) == count
    assert len(passes) == count


def test_tokens_come_one_by_one_and_the_prompt_is_left_alone() -> None:
    """A text can thus be shown as it comes, and stopped."""
    model, passes, prompt = build(), [], [1, 2]
    model.register_forward_hook(lambda module, args, out: passes.append(args[0].shape[1]))
    stream = generate(model, prompt, 10**9, WARM, seed=0)
    assert not passes
    for _ in range(4):
        next(stream)
    assert passes == [2, 1, 1, 1], "the cache is not used, or tokens are drawn ahead"
    assert prompt == [1, 2]


def test_a_prompt_that_fills_the_context_is_read_whole() -> None:
    model = build()
    prompt = list(range(10))
    with torch.no_grad():
        expected = int(model(torch.tensor([prompt]))[0, -1].argmax())
    assert tokens(model, prompt, 1, GREEDY) == [expected]


@pytest.mark.parametrize(
    ("prompt", "how", "sentence"),
    [
        ([], WARM, "^the prompt is empty; give it at least one character$"),
        ([1] * 11, WARM, "^the prompt has 11 tokens and the model's context 10; shorten the prompt to fit$"),
        ([1], SamplingSettings(-1.0), "^--temperature must be 0 or more, not -1.0$"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused_at_once(
    prompt: list[int], how: SamplingSettings, sentence: str
) -> None:
    """The error comes before the first token is asked for, and names the remedy."""
    with pytest.raises(ConfigError, match=sentence):
        generate(build(), prompt, 5, how, seed=0)


def test_no_graph_is_kept() -> None:
    """Otherwise memory would grow with each token."""
    model, grads = build(), []
    model.register_forward_hook(lambda module, args, out: grads.append(out.requires_grad))
    tokens(model, [1, 2], 5, WARM)
    assert grads == [False] * 5


def test_bf16_runs_with_a_cache_of_its_own_dtype() -> None:
    model, dtypes = build(**OPTIONS[1]), set()
    model.register_forward_hook(lambda module, args, out: dtypes.add((out.dtype, args[1].cache.keys.dtype)))
    assert len(tokens(model, [1, 2], 25, WARM, dtype=torch.bfloat16)) == 25
    assert dtypes == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_generation_that_is_over_leaves_no_cache_and_no_copy_of_weights(dtype: torch.dtype) -> None:
    """Not until Python looks for garbage, which may be much later: a training makes a sample every so many steps."""
    model = build(**OPTIONS[0])

    def large_ones() -> int:
        return sum(type(each) in (StaticCache, Transformer) for each in gc.get_objects())

    tokens(model, [1, 2], 5, GREEDY, dtype=dtype)  # The first one of a process imports, and keeps frames of that.
    gc.collect()
    gc.disable()
    try:
        before = large_ones()
        assert len(tokens(model, [1, 2], 5, GREEDY, dtype=dtype)) == 5
        assert large_ones() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("options", "batches", "dtype"),
    [(OPTIONS[0], 1, torch.float32), (OPTIONS[0], 2, torch.bfloat16), (OPTIONS[1], 1, torch.float32)],
)
def test_a_model_in_shards_gives_the_same_text(options: dict[str, Any], batches: int, dtype: torch.dtype) -> None:
    """As training with FSDP samples, where the model can neither be copied nor be read between the passes.

    With one batch a step each block is gathered by itself. The rows of a step have one length, or several.
    Null keys are in shards too.
    """

    def texts() -> list[list[int]]:
        both = [Request(prompt, 8, GREEDY, 0) for prompt in ([1, 2], [3])]
        generation = Generation(model, both, batch_size=2, dtype=dtype)
        drawn = [(each.request, each.token) for each in generation]
        return [[token for request, token in drawn if request == number] for number in range(2)]

    model = build(**options)
    alone, together = tokens(model, [1, 2], 8, GREEDY, dtype=dtype), texts()
    config = parse({"run": {"parallel": "fsdp"}, "optim": {"grad_accum": 2 * batches}})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = Mesh.of(config.run, 2)
        Processes(Place(rank=0, processes=2), mesh=mesh).wrap(model, config, torch.device("cpu"), dtype, compiled=False)
        model(torch.tensor([[1]]))  # FSDP makes its buffers in a step of training.
        assert tokens(model, [1, 2], 8, GREEDY, dtype=dtype) == alone
        assert texts() == together
    finally:
        dist.destroy_process_group()
