"""The interface of an attention rule, and attention by dense weights, which every rule can do.

Shapes: B batch, H heads, K key heads (each for H/K neighbouring heads), T queries, S keys (null and cached ones first),
D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.ops import Backend, Choice, choose_backend, for_each_query, largest_entries

# Dense weights are computed for at most so many scores at a time, but at least for one row. With 8192 keys and 8 heads
# that is 256 rows. An observer measures them in float64, where one copy takes 128 MiB. Nothing else keeps a copy of a
# block but the backward, and on a GPU larger blocks are fewer launches, and fewer kernels to compile.
BLOCK_SCORES, BLOCK_SCORES_OF_A_GPU = 2**24, 2**26

ObserveBlock = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], None]


class Rows(NamedTuple):
    """A block of t rows of one layer, with their scores [B, H, t, S] and the k of each, [B, H, t].

    `mask` is bool [t, S], True where a query sees a key; the first `null_keys` keys are null keys, and the first query
    stands at key `first`. No row is padded. `weights` computes the weights [B, H, t, S] by the layer's rule from a
    mask, which may also be [B, H, t, S]. `scores_of` computes the scores [B, H, t, S] of other queries of the same
    sequences, by the keys [H, t] at which they stand. `eps` is the temperature of the scores, 1 if the rule has none.
    """

    scores: Tensor
    budget: Tensor
    eps: float
    mask: Tensor
    null_keys: int
    first: int
    weights: Callable[[Tensor], Tensor]
    scores_of: Callable[[Tensor], Tensor]

    def largest(self, ranks: Tensor, n: int) -> Tensor:
        """Returns the mask, bool [B, H, t, S], of the n keys of each row with the largest `ranks` [B, H, t, S].

        Null keys stay: they are no part of the text, and are not among the n.
        """
        is_key = self.mask.clone()
        is_key[:, : self.null_keys] = False
        ranks = ranks.detach().to(torch.float32).masked_fill(~is_key, -torch.inf)
        return (largest_entries(ranks, n) & is_key) | (self.mask & ~is_key)


EditRows = Callable[[Rows], Tensor]


class Products(NamedTuple):
    """The number of matrix products of attention in forward and backward, each of a query with `keys` keys."""

    forward: int
    backward: int
    keys: float


def visible(first: int, t: int, S: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Returns which of S keys each of t queries sees, the first of which stands at key `first`: bool [t, S].

    It is [B, 1, t, S] for `documents` [B, S] (see `AttentionRule.attend`).
    """
    mask = torch.ones(t, S, dtype=torch.bool, device=device).tril(first)
    if documents is None:
        return mask
    same = documents[:, first : first + t, None] == documents[:, None]
    return (mask & same).unsqueeze(1)


def _of_each(budget: float | Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    """The budget of each query, [B, H, T]."""
    if not isinstance(budget, Tensor):
        budget = torch.full((), budget, device=query.device)  # A copy from the host would wait for the GPU.
    return budget.to(dtype).expand(query.shape[:3])


class AttentionRule(ABC):
    """How one layer turns scores into weights. `eps` is its temperature."""

    has_budget = False  # Each row has a budget k and sums to it. Rows of the other rules sum to 1.
    has_eps = True  # The weights depend on ε.
    has_threshold = False  # The weights of a row are min(1, exp((s + a)/ε)) for some a, and sum to its budget.
    uses_operator = False  # `cda_cli.ops` computes the weights, with a solver and a backend.
    code = "PyTorch, dense weights"  # The code that computes the weights if the operator does not, in words.

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend
        self.eps = config.attn_eps
        self.scale = config.head_width**-0.5
        self.largest_budget = max(1.0, config.attn_k)  # No row has a larger k.

    @abstractmethod
    def weights(self, scores: Tensor, budget: Tensor, mask: Tensor) -> Tensor:
        """Returns the dense weights [B, H, t, S] of scores [B, H, t, S], in their dtype; a masked entry gets 0.

        `budget` is the k of each row, [B, H, t]. `mask` is bool [t, S] or [B, H, t, S], True where a query sees a key;
        every query sees at least one.
        """

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, budget: float | Tensor, documents: Tensor | None = None
    ) -> Tensor:
        """Computes causal attention [B, H, T, D] of query [B, H, T, D] to key and value [B, K, S, D], S ≥ T.

        Query t sees the keys up to t + S − T, and with `documents`, integers [B, S], only those of its own run of equal
        numbers. `budget` is the k of each row: a number, or [B, H, T].
        """
        return self.attend_densely(query, key, value, budget, documents=documents)

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, budget: float | Tensor, visible_B: Tensor | None
    ) -> Tensor:
        """Computes attention [B, H, 1, D] of one query a row, which sees the first `visible_B` of the S keys.

        The arguments are those of `attend`, and `visible_B` is int64 [B], or None where each row sees all keys. There
        is no gradient.
        """
        if visible_B is None:
            return self.attend(query, key, value, budget)
        return self.attend_densely(query, key, value, budget, visible_B=visible_B)

    def attend_densely(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        budget: float | Tensor,
        observe: ObserveBlock | None = None,
        edit: EditRows | None = None,
        documents: Tensor | None = None,
        visible_B: Tensor | None = None,
    ) -> Tensor:
        """Computes what `attend` does, or `decode` with `visible_B`, by dense weights, block after block of queries.

        `edit`, if given, returns other weights for each block. `observe`, if given, gets the weights [B, H, t, S] of
        each block, its k [B, H, t], the queries [B, H, t, D], times the scale of the scores, the keys and the values
        [B, H, S, D], and the index, among the S keys, of the last one that its first query sees.
        """
        assert edit is None or (documents is None and visible_B is None), "an edit takes one mask for all rows"
        B, H, T, _ = query.shape
        key, value = for_each_query(key, H), for_each_query(value, H)
        S, dtype = key.shape[2], torch.promote_types(query.dtype, torch.float32)
        key_BHDS = key.to(dtype).transpose(-1, -2)
        small = observe is not None or query.device.type == "cpu"
        rows = max(1, (BLOCK_SCORES if small else BLOCK_SCORES_OF_A_GPU) // (B * H * S))
        scores_of = partial(self._scores_of, query.to(dtype), key_BHDS)
        outputs = []
        blocks = zip(query.split(rows, 2), _of_each(budget, query, dtype).split(rows, 2), strict=True)
        for number, (query_BHtD, budget_BHt) in enumerate(blocks):
            last = S - T + number * rows
            scores = self._scores(query_BHtD.to(dtype), key_BHDS)
            if visible_B is None:
                mask = visible(last, scores.shape[2], S, documents, scores.device)
            else:
                mask = torch.arange(S, device=scores.device) < visible_B.view(B, 1, 1, 1)
            weights_under = partial(self.weights, scores, budget_BHt)
            if edit is None:
                weights = weights_under(mask)
            else:
                eps = self.eps if self.has_eps else 1.0
                null = self.config.null_kv
                weights = edit(Rows(scores, budget_BHt, eps, mask, null, last, weights_under, scores_of))
            if observe is not None:
                observe(weights, budget_BHt, self.scale * query_BHtD, key, value, last)
            outputs.append(weights.to(value.dtype) @ value)
        return torch.cat(outputs, 2)

    def observe_some(
        self, query: Tensor, key: Tensor, value: Tensor, budget: float | Tensor, observe: ObserveBlock, apart: int
    ) -> None:
        """Gives `observe` what `attend_densely` does, of one in `apart` queries: those amid `apart` neighbours."""
        (B, H, T, _), S = query.shape, key.shape[2]
        budget = _of_each(budget, query, torch.promote_types(query.dtype, torch.float32))
        heads = for_each_query(key, H), for_each_query(value, H)
        block = apart * max(1, BLOCK_SCORES // (B * H * S))
        for start in range(apart // 2, T, block):
            rows = slice(start, start + block, apart)
            weights = self.weights_of(query, key, budget, rows)
            observe(weights, budget[:, :, rows], self.scale * query[:, :, rows], *heads, S - T + start)

    def weights_of(self, query: Tensor, key: Tensor, budget: float | Tensor, rows: slice) -> Tensor:
        """Returns the dense weights [B, H, r, S], at least float32, of those r of the T queries that `rows` takes.

        The other arguments are those of `attend`.
        """
        H, T, S = *query.shape[1:3], key.shape[2]
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = self._scores(query[:, :, rows].to(dtype), for_each_query(key, H).to(dtype).transpose(-1, -2))
        budget = _of_each(budget, query, dtype)[:, :, rows]
        places = torch.arange(S, device=query.device)
        return self.weights(scores, budget, places <= places[S - T :][rows].unsqueeze(1))

    def _scores(self, query_BHtD: Tensor, key_BHDS: Tensor) -> Tensor:
        with torch.autocast(query_BHtD.device.type, enabled=False):
            return self.scale * query_BHtD @ key_BHDS

    def _scores_of(self, query_BHTD: Tensor, key_BHDS: Tensor, chosen_Ht: Tensor) -> Tensor:
        """Returns the scores [B, H, t, S] of the queries that stand at these keys, for each head."""
        heads = torch.arange(len(chosen_Ht), device=chosen_Ht.device).unsqueeze(1)
        earlier = key_BHDS.shape[-1] - query_BHTD.shape[2]
        return self._scores(query_BHTD[:, heads, chosen_Ht - earlier], key_BHDS)

    @property
    def divides_by_eps(self) -> bool:
        """Whether ε enters as scores/ε alone, so that a factor on the query stands for another ε."""
        return self.has_eps

    @property
    def recompiles_for_each_eps(self) -> bool:
        """Whether ε anneals as a number, which compiled code takes for a constant, so that a new one compiles again."""
        return self.config.eps_anneal_start is not None and self.has_eps and not self.divides_by_eps

    @property
    def learns_budget(self) -> bool:
        """Whether each query and head has a k of its own, from a linear."""
        return self.has_budget and self.config.learned_k

    @property
    def max_keys(self) -> int:
        """The number of keys that the last query of a full sequence sees."""
        return self.config.seq_len + self.config.null_kv

    def choose_backend(self, device: torch.device) -> Choice:
        """Chooses the backend of the operator on `device`. Raises ValueError if a forced one cannot run."""
        return choose_backend(self.backend, self.config.solver, device)

    def products(self, backend: str, device: torch.device, dtype: torch.dtype) -> Products:
        """Returns the matrix products of a full sequence in `dtype`, with the operator on `backend` and `device`.

        Those of dense weights, unless a rule has other code.
        """
        return self.dense_products()

    def dense_products(self) -> Products:
        """Returns the matrix products of a full sequence by dense weights.

        They are kept for the backward, and also computed for keys that a query does not see.
        """
        return Products(2, 4, self.max_keys)

    def scratch(self, batch_size: int, device: torch.device, choice: Choice) -> dict[str, int]:
        """Returns the bytes that an operator takes for itself, by the start of its name, as measured on a CPU."""
        return {}

    def warnings(self) -> list[str]:
        """Returns a sentence about each setting that is allowed but can hardly be meant."""
        config = self.config
        if config.learned_k and not self.has_budget:
            return [f"learned_k has no effect with {config.attention} attention; its control there is output_gate"]
        if config.learned_eps and not self.has_eps:
            return [f"learned_eps has no effect with {config.attention} attention, which has no ε"]
        if config.normalise == "k" and not self.has_budget:
            return [f"normalise has no effect with {config.attention} attention, whose rows sum to 1"]
        return []

    def selection(self) -> str:
        """How much a row selects, in a few words, such as "k = 2"; empty where `attn_k` has no effect."""
        return ""

    def description(self, eps: float | None) -> str:
        """The rule in a few words, with its ε: "softmax", or "coordinate-descent, k = 2, exact solver, ε = 0.1"."""
        solver = f"{self.config.solver} solver" if self.uses_operator else ""
        temperature = f"ε = {eps:g}" if eps is not None else ""
        return ", ".join(filter(None, [self.config.attention, self.selection(), solver, temperature]))
