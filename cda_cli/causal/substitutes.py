"""Substitutes: all attention weights are computed in another way, or the model is another one.

Shapes: B batch, H heads, t queries of a block, S keys, T queries of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cda_cli.causal.interventions import Intervention, edited
from cda_cli.data import Batch
from cda_cli.errors import ConfigError, did_you_mean
from cda_cli.inspection.seen_rows import CAPPED_WEIGHT
from cda_cli.model import Rows, Transformer, editing
from cda_cli.token_losses import token_losses

GATE = "gate"


def softmax_weights(rows: Rows) -> Tensor:
    """Returns softmax(s/ε) of each row, [B, H, t, S]."""
    return (rows.scores / rows.eps).masked_fill(~rows.mask, -torch.inf).softmax(-1)


def gate_weights(rows: Rows) -> Tensor:
    """Returns k·softmax(s/ε) of each row, [B, H, t, S]."""
    return rows.budget.unsqueeze(-1) * softmax_weights(rows)


def is_bounded(rows: Rows) -> Tensor:
    """Whether each row sees more than k keys, [B, H, t]. Any other row has no choice: it has λ = 1 on each key."""
    return rows.mask.sum(-1) > rows.budget


class Substitute(Intervention):
    """All layers compute something else."""

    kind = "substitutes"


class OfBudget(Substitute):
    """A change of the budget k, or of what comes of it."""

    def require(self, model: Transformer) -> None:
        if not model.attention_rule.has_budget:
            attention = model.config.attention
            raise ConfigError(f"{attention} attention has no k, so --as {self.name} has no meaning; leave it out")


class Gate(OfBudget):
    """The gate control: every bounded row is k·softmax(s/ε), a softmax with a gate, that caps nothing.

    A row is gate-equivalent if its rule computes the same, which is so if no weight of k·softmax(s/ε) is above 1.
    Source: docs/operator.md, where nothing is capped.
    """

    name, description = GATE, "k·softmax(s/ε)"

    def __init__(self) -> None:
        self.equivalent_share = math.nan  # of the bounded rows; NaN if there are none, and before `count`

    def applied(self, model: Transformer) -> AbstractContextManager[nn.Module]:
        return edited(model, rows=self)

    def __call__(self, rows: Rows) -> Tensor:
        gate, bounded = gate_weights(rows), is_bounded(rows)
        return torch.where(bounded.unsqueeze(-1), gate, rows.mask.to(gate.dtype))

    @torch.no_grad()
    def count(
        self,
        model: Transformer,
        batches: Iterable[Batch],
        device: torch.device,
        dtype: torch.dtype,
        advance: Callable[[int], None],
    ) -> None:
        """Counts the gate-equivalent rows of the model as it is, in evaluation mode."""
        counts = torch.zeros(2, dtype=torch.int64, device=device)

        def counted(rows: Rows) -> Tensor:
            bounded = is_bounded(rows)
            equivalent = bounded & (gate_weights(rows).amax(-1) <= 1)
            counts.add_(torch.stack((bounded.sum(), equivalent.sum())))
            return rows.weights(rows.mask)

        for batch in batches:
            with editing(model, rows=counted):
                token_losses(model, batch, device, dtype)
            advance(len(batch.inputs))
        bounded, equivalent = counts.tolist()
        self.equivalent_share = equivalent / bounded if bounded else math.nan

    def columns(self) -> dict[str, str]:
        return {"gate-equivalent": f"{self.equivalent_share:.2%}"}

    def fields(self) -> dict[str, Any]:
        return {"gate_equivalent_rows": self.equivalent_share}


@dataclass(frozen=True)
class Part(OfBudget):
    """Only the capped weights (λ = 1) or only the free ones stay, and the others are 0."""

    capped: bool

    @property
    def name(self) -> str:
        return "capped" if self.capped else "free"

    @property
    def description(self) -> str:
        return f"{self.name} keys only"

    def applied(self, model: Transformer) -> AbstractContextManager[nn.Module]:
        return edited(model, rows=self)

    def __call__(self, rows: Rows) -> Tensor:
        weights = rows.weights(rows.mask)
        return weights.where((weights >= CAPPED_WEIGHT) == self.capped, 0.0)


@dataclass(frozen=True)
class OtherEps(Substitute):
    eps: float

    @property
    def name(self) -> str:
        return f"eps[{self.eps:.12g}]"

    @property
    def description(self) -> str:
        return f"ε = {self.eps:g}"

    def require(self, model: Transformer) -> None:
        if model.attention_eps is None:
            raise ConfigError(f"{model.config.attention} attention has no ε; leave --as eps={self.eps:g} out")

    @contextmanager
    def applied(self, model: Transformer) -> Iterator[nn.Module]:
        before = model.attention_eps
        assert before is not None
        model.set_attention_eps(self.eps)
        try:
            yield model
        finally:
            model.set_attention_eps(before)


@dataclass(frozen=True)
class OtherBudget(OfBudget):
    """Every row has the budget `k`, whatever it learned."""

    k: float

    @property
    def name(self) -> str:
        return f"k[{self.k:.12g}]"

    @property
    def description(self) -> str:
        return f"k = {self.k:g}"

    def applied(self, model: Transformer) -> AbstractContextManager[nn.Module]:
        return edited(model, budget=lambda layer, budget: torch.full_like(budget, self.k))


@dataclass(frozen=True)
class ScaledBudget(OfBudget):
    """Each row has its k times `factor`, the measured side of the first-order check of ∂L/∂k."""

    factor: float

    @property
    def name(self) -> str:
        return f"k-times[{self.factor:.12g}]"

    @property
    def description(self) -> str:
        return f"k × {self.factor:g}"

    def applied(self, model: Transformer) -> AbstractContextManager[nn.Module]:
        return edited(model, budget=lambda layer, budget: budget * self.factor)


class Softmax(Substitute):
    """The weights softmax(s/ε), which sum to 1: what the selection adds to it is capped keys and a gain of k."""

    name, description = "softmax", "softmax(s/ε)"

    def applied(self, model: Transformer) -> AbstractContextManager[nn.Module]:
        # A layer may divide its output by k, and a softmax has the k of 1.
        return edited(model, rows=softmax_weights, budget=lambda layer, budget: torch.ones_like(budget))


class RandomWeights(Substitute):
    """A model of the same settings with the weights with which training begins: the floor of every figure."""

    name, description = "random-weights", "random weights"

    def __init__(self) -> None:
        self.model: Transformer | None = None

    @contextmanager
    def applied(self, model: Transformer) -> Iterator[nn.Module]:
        if self.model is None:
            self.model = initial_model(model)
        yield self.model


def initial_model(model: Transformer) -> Transformer:
    """Makes a model of the settings, ε and device of `model`, in evaluation mode, with initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Transformer(model.config, model.each_block()[0].attention.backend)
    if model.attention_eps is not None:
        made.set_attention_eps(model.attention_eps)
    return made.to(next(model.parameters()).device).eval()


WORDS: dict[str, Callable[[], Substitute]] = {
    GATE: Gate,
    "capped": lambda: Part(True),
    "free": lambda: Part(False),
    "softmax": Softmax,
    "random-weights": RandomWeights,
}
NUMBERED: dict[str, Callable[[float], Substitute]] = {"eps=": OtherEps, "k=": OtherBudget, "k*": ScaledBudget}


def parse_substitutes(given: Sequence[str]) -> list[Substitute]:
    """Reads substitutes such as "gate", "eps=0.1,1" or "k*1.01". Raises ConfigError for what is none."""
    return [substitute for text in given for substitute in _parse(text)]


def _parse(text: str) -> list[Substitute]:
    if text in WORDS:
        return [WORDS[text]()]
    for start, make in NUMBERED.items():
        if text.startswith(start):
            return [make(_positive(number, text)) for number in text.removeprefix(start).split(",")]
    known = [*WORDS, *(f"{start}NUMBER" for start in NUMBERED)]
    raise ConfigError(f"--as {text} is unknown: {did_you_mean(text, known)}")


def _positive(number: str, text: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"--as {text} takes numbers above 0, such as eps=0.1,0.5 or k=1,2, not {number!r}")
    return value
