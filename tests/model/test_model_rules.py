"""Each attention rule equals its definition in float64, in every way that it can be computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.model import StaticCache, Transformer
from cda_cli.model.observe import ObservedAttention, observing
from cda_cli.model.rules import RULES, AttentionRule, attention_rule
from cda_cli.ops import Backend, reference_soft_topk
from tests.devices import DEVICES
from tests.model.cases import build, tiny, tokens

EPS, K = 0.3, 2.5
CPU = torch.device("cpu")


def _entmax(scores: Tensor) -> Tensor:
    """Finds τ by bisection."""
    low, high = scores.amax(-1, keepdim=True) / 2 - 1, scores.amax(-1, keepdim=True) / 2
    for _ in range(100):
        middle = (low + high) / 2
        too_much = (scores / 2 - middle).clamp(min=0).square().sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return (scores / 2 - low).clamp(min=0).square()


def _hard_topk(scores: Tensor) -> Tensor:
    """Keeps the 2 largest, by their order."""
    exponentials = (scores / EPS).exp()
    kept = torch.where(scores.argsort(-1).argsort(-1) >= scores.shape[-1] - 2, exponentials, 0.0)
    return kept / kept.sum(-1, keepdim=True)


# From scores [..., S] in float64, −inf where masked, to weights.
DEFINITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.exp() / scores.exp().sum(-1, keepdim=True),
    "tempered-softmax": lambda scores: (scores / EPS).exp() / (scores / EPS).exp().sum(-1, keepdim=True),
    "coordinate-descent": lambda scores: reference_soft_topk(scores, K, EPS, scores > -torch.inf).weights,
    "hard-topk": _hard_topk,
    "entmax": lambda scores: _entmax(scores / EPS),
}
each_rule = pytest.mark.parametrize("name", sorted(RULES))


def rule_of(name: str, backend: Backend = "auto") -> AttentionRule:
    return attention_rule(tiny(attention=name, attn_k=K, attn_eps=EPS, dim_head=8), backend)


def problem(T: int, S: int, key_heads: int = 3) -> list[Tensor]:
    """Returns query, key and value with 2 sequences, 3 heads of queries and 8 channels."""
    generator = torch.Generator().manual_seed(T)
    shapes = ((3, T), (key_heads, S), (key_heads, S))
    return [torch.randn(2, *shape, 8, generator=generator) for shape in shapes]


def defined(name: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns output and weights in float64, by the definition."""
    query, key, value = query.double(), *(x.double().expand(2, 3, -1, -1) for x in (key, value))
    T, S = query.shape[2], key.shape[2]
    scores = query @ key.transpose(-1, -2) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(S - T), -torch.inf)
    weights = DEFINITIONS[name](scores)
    return weights @ value, weights


def test_every_rule_of_the_configuration_is_there_and_is_tested() -> None:
    """A name without a rule is a KeyError in the middle of a run, and a rule without a name can never be chosen."""
    assert set(RULES) == set(get_args(ModelConfig.model_fields["attention"].annotation)) == set(DEFINITIONS)


@each_rule
@pytest.mark.parametrize("key_heads", [3, 1])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (5, 9), (1, 6), (1, 1)])
def test_a_rule_is_its_definition(name: str, T: int, S: int, key_heads: int) -> None:
    """Null and cached keys are in front. The rule attends by its own code, and by its dense weights."""
    query, key, value = problem(T, S, key_heads)
    output, weights = defined(name, query, key, value)
    rule = rule_of(name)
    budget = K if rule.has_budget else 1.0
    seen: list[Tensor] = []
    torch.testing.assert_close(rule.attend(query, key, value, budget).double(), output, rtol=0, atol=2e-5)
    densely = rule.attend_densely(query, key, value, budget, lambda weights, *_: seen.append(weights))
    torch.testing.assert_close(densely.double(), output, rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.cat(seen, 2).double(), weights, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@each_rule
def test_a_rule_decodes_rows_of_unequal_length(name: str, backend: Backend) -> None:
    """Row by row it is what the rule attends to alone."""
    device = DEVICES[-1] if backend == "triton" else "cpu"
    lengths, rule = torch.tensor([9, 4]), rule_of(name, backend)
    inputs = problem(1, 9, 1)
    on_device = (tensor.to(device) for tensor in inputs)
    output = rule.decode(*on_device, K if rule.has_budget else 1.0, lengths.to(device)).cpu()
    for row, length in enumerate(lengths.tolist()):
        query, key, value = (x[row : row + 1] for x in inputs)
        expected, _ = defined(name, query, key[:, :, :length], value[:, :, :length])
        torch.testing.assert_close(output[row : row + 1].double(), expected[:1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_softmax_decodes_heads_that_are_too_wide_for_a_kernel(solver: str) -> None:
    """Softmax has nothing to do with the backend of the operator, nor with its solver."""
    rule = attention_rule(tiny(attention="softmax", dim_head=272, solver=solver), "triton")
    query, key, value = (torch.randn(2, 3, length, 272) for length in (1, 4, 4))
    output = rule.decode(query, key, value, 1.0, torch.tensor([4, 2]))
    expected = torch.nn.functional.scaled_dot_product_attention(query[1:], key[1:, :, :2], value[1:, :, :2])
    torch.testing.assert_close(output[1:], expected)


@each_rule
def test_its_gradient_is_that_of_its_definition(name: str) -> None:
    """It equals differences of the definition in float64, along a direction for each of query, key and value."""
    inputs = problem(6, 8)
    rule = rule_of(name)
    weights = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(9))
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    (rule.attend(*leaves, K if rule.has_budget else 1.0) * weights).sum().backward()
    for place, leaf in enumerate(leaves):
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            moved = [tensor.double() for tensor in inputs]
            moved[place] = moved[place] + sign * 1e-6 * direction
            ends.append((defined(name, *moved)[0] * weights).sum().item())
        assert leaf.grad is not None
        found = (leaf.grad.double() * direction).sum().item()
        assert found == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-3)


@each_rule
def test_a_model_is_the_same_with_a_cache_and_never_sees_a_later_token(name: str) -> None:
    model = build(config := tiny(attention=name, null_kv=2, position="rotary", attn_k=K))
    batch = tokens(config)
    cache = StaticCache(model, len(batch), torch.float32).rows()
    changed = batch.clone()
    changed[:, 6:] = (batch[:, 6:] + 1) % config.vocab_size
    with torch.no_grad():
        logits = model(batch)
        parts = [model(batch[:, start:stop], cache) for start, stop in ((0, 5), (5, 6), (6, 11))]
        torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(changed)[:, :6], logits[:, :6], rtol=0, atol=1e-6)


@each_rule
def test_an_observer_sees_rows_that_sum_to_their_k(name: str) -> None:
    model = build(config := tiny(attention=name, null_kv=1, attn_k=K))
    seen: list[ObservedAttention] = []
    with (
        torch.no_grad(),
        observing(model, lambda one: seen.append(one) if isinstance(one, ObservedAttention) else None),
    ):
        logits = model(tokens(config))
    torch.testing.assert_close(logits, model(tokens(config)).detach(), rtol=0, atol=1e-5)
    visible = torch.arange(2, config.seq_len + 2).float()
    for one in seen:
        assert (one.weights >= 0).all()
        torch.testing.assert_close(one.weights.sum(-1), one.sparsity_k.minimum(visible), atol=1e-4, rtol=0)
    zeros = [(one.weights[:, :, -1] == 0).float().mean().item() for one in seen]
    by_definition = DEFINITIONS[name](torch.linspace(-3, 3, 9, dtype=torch.float64)) == 0
    assert all(share > 0.2 for share in zeros) == by_definition.any(), "which rules give weights of 0"


@pytest.mark.slow
@each_rule
def test_a_model_trains_compiled_and_in_bf16(name: str) -> None:
    """The loss is the same, and each parameter has a gradient. One block is enough: each further one compiles alike."""
    torch._dynamo.reset()
    settings: dict[str, Any] = {"learned_k": True, "output_gate": True, "attn_bias": "all", "kv_heads": 1}
    model, batch = build(tiny(**settings, attention=name, depth=1)), tokens(tiny())
    losses = []
    for called, is_half in ((model, False), (torch.compile(model, backend="aot_eager"), False), (model, True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss = called(batch[:, :-1], targets_BT=batch[:, 1:]).mean()
        loss.backward()
        losses.append(loss.detach())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.numel())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-2, atol=0)


def test_a_learned_k_is_only_where_there_is_a_budget() -> None:
    for name, rule in RULES.items():
        model = Transformer(tiny(attention=name, learned_k=True))
        assert any("to_learned_k" in key for key in model.state_dict()) == rule.has_budget


def test_the_tempered_softmax_is_the_soft_topk_with_a_budget_of_one() -> None:
    """Softmax itself ignores ε, so that runs from before it had that setting stay what they are."""
    query, key, value = problem(7, 7)
    tempered = attention_rule(tiny(attention="tempered-softmax", dim_head=8)).attend(query, key, value, 1.0)
    soft = attention_rule(tiny(attention="coordinate-descent", dim_head=8)).attend(query, key, value, 1.0)
    torch.testing.assert_close(tempered, soft, rtol=0, atol=1e-5)
    plain = [attention_rule(tiny(attention="softmax", attn_eps=eps)).attend(query, key, value, 1.0) for eps in (1, 0.1)]
    assert plain[0].equal(plain[1])


@given(
    n=st.integers(1, 3000),
    scale=st.floats(-3, 3).map(lambda power: 10**power),
    power=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_entmax_finds_its_threshold_in_rows_of_every_length_and_scale(
    n: int, scale: float, power: float, seed: int
) -> None:
    """Its steps are as many for every row, so that too few of them would show in some."""
    scores = scale * torch.rand(3, n, generator=torch.Generator().manual_seed(seed)) ** power
    weights = rule_of("entmax").weights(scores, torch.ones(3), torch.ones(3, n, dtype=torch.bool))
    torch.testing.assert_close(weights.double(), _entmax((scores / EPS).double()), rtol=0, atol=2e-6)
