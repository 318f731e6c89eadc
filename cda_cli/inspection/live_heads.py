"""Live heads: the queries and keys of a window in 8 bits, from which rows follow for any ε and k, approximately.

Shapes: B batch, H heads, t queries of a block, Q queries, S keys (null keys first), D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cda_cli.model import Transformer
from cda_cli.model.observe import ObservedAttention

STEPS = 127  # of the largest component of a vector


class Quantised(NamedTuple):
    """Vectors [N, D] as whole numbers of −127 to 127, each times the scale of its vector, [N]."""

    steps: NDArray[np.int8]
    scale: NDArray[np.float32]

    @classmethod
    def of(cls, vectors: Tensor) -> Quantised:
        """Takes `vectors` [N, D]; each component is off by 1/254 of the largest of its vector at most."""
        largest = vectors.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        steps = (vectors.float() * (STEPS / largest)).round().to(torch.int8)
        return cls(steps.cpu().numpy(), (largest.squeeze(-1) / STEPS).cpu().numpy())

    def first(self, count: int) -> Quantised:
        return Quantised(self.steps[:count], self.scale[:count])

    @classmethod
    def joined(cls, parts: list[Quantised]) -> Quantised:
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


class LiveHead(NamedTuple):
    """One head. The scores of query t are its products with the keys up to t, of which null keys are the first."""

    layer: int
    head: int
    queries: Quantised
    keys: Quantised

    def scores(self, query: int) -> NDArray[np.float64]:
        """The scores of the keys that a query sees, null keys first."""
        seen = len(self.keys.steps) - len(self.queries.steps) + query + 1
        steps = self.keys.steps[:seen].astype(np.float64) @ self.queries.steps[query]
        return steps * self.keys.scale[:seen] * self.queries.scale[query]

    def to_bytes(self) -> bytes:
        """The steps of queries and keys, then the scales of both, little-endian float32."""
        scales = (each.scale.astype("<f4").tobytes() for each in (self.queries, self.keys))
        return b"".join([self.queries.steps.tobytes(), self.keys.steps.tobytes(), *scales])


def follows_from_scores(model: Transformer) -> bool:
    """Whether the weights of attention are the exact soft top-k of the scores, so that rows follow from live heads.

    They do not with nape: the channels of positions are so large that 8 bits leave nothing of the others.
    """
    is_exact = model.attention_rule.uses_operator and model.config.solver == "exact"
    return is_exact and model.config.position != "nape"


def live_bytes(queries: int, null_keys: int, width: int) -> int:
    """The bytes of one live head."""
    return (2 * queries + null_keys) * (width + 4)


class LiveCollector:
    """Sees the blocks of rows of the first sequence of a batch, in order, and keeps queries and keys of every head."""

    def __init__(self) -> None:
        self._queries: dict[tuple[int, int], list[Quantised]] = {}
        self._keys: dict[tuple[int, int], Quantised] = {}

    def add(self, seen: ObservedAttention) -> None:
        """Adds a block of rows, of a layer that tells its queries and keys."""
        if seen.queries is None or seen.keys is None:
            return
        for head in range(seen.queries.shape[1]):
            place = (seen.layer, head)
            self._queries.setdefault(place, []).append(Quantised.of(seen.queries[0, head]))
            if place not in self._keys:
                self._keys[place] = Quantised.of(seen.keys[0, head])

    def head(self, layer: int, head: int, queries: int, null_keys: int) -> LiveHead:
        """Returns a head with its first `queries` queries and the keys up to them."""
        place = (layer, head)
        of_queries, of_keys = Quantised.joined(self._queries[place]), self._keys[place]
        return LiveHead(layer, head, of_queries.first(queries), of_keys.first(null_keys + queries))
