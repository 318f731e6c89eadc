"""Causal self-attention whose weights are a softmax or a coordinate-descent soft top-k.

Shapes: B batch, T queries, C width of the residual stream, H heads, D head width, S keys (null and cached ones first).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cda_cli.config import ModelConfig
from cda_cli.model.cache import KeyValueCache
from cda_cli.model.layers import EPS, HeadNorm, RotaryPositions, solver_settings
from cda_cli.model.observe import OBSERVED, AttentionSeen, Observer
from cda_cli.ops import Backend, choose_backend, soft_topk, soft_topk_attention
from cda_cli.ops.transforms import transformed

# Of a block that is compiled to be computed again, these keep what an autograd.Function makes (2.11 does).
KEEPS = torch.__version__ < "2.13"


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, backend: Backend) -> None:
        super().__init__()
        self.config, self.layer, self.backend = config, layer, backend
        self.heads, self.scale = config.heads, config.head_width**-0.5
        inner = config.heads * config.head_width
        self.eps, self.solver = config.attn_eps, solver_settings(config)
        self.observer: Observer | None = None
        self.computed_again = False  # in the backward, by activation checkpointing

        self.to_qkv = nn.Linear(config.dim, inner * 3, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)
        self.null_kv = nn.Parameter(torch.randn(2, config.heads, config.null_kv, config.head_width))
        self.query_norm = HeadNorm(config.head_width) if config.qk_norm else None
        self.key_norm = HeadNorm(config.head_width) if config.qk_norm else None
        rotary = config.position == "rotary"
        self.rotary = RotaryPositions(config.head_width, config.seq_len, config.rotary_base) if rotary else None
        learned_k = config.learned_k and config.attention == "coordinate-descent"
        self.to_learned_k = _budget_linear(config) if learned_k else None
        self.to_gate = _budget_linear(config) if config.output_gate else None

    def forward(self, x_BTC: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        query, key, value, rest = self._placed(self._projected(x_BTC), cache)
        budgets = self._budgets(x_BTC, rest)
        # k of each row: a number, or [B, H, T] where it is learned.
        sparsity_k = self.config.attn_k if self.to_learned_k is None else budgets.pop(0)
        if self.observer is not None:
            out_BHTD = self._observed(query, key, value, sparsity_k)
        elif self.config.attention == "softmax":
            out_BHTD = _softmax_attention(query, key, value, self.scale)
        else:
            out_BHTD = self._soft_topk_attention(query, key, value, sparsity_k)
        if self.to_gate is not None:
            out_BHTD = out_BHTD * budgets.pop(0).unsqueeze(-1)
        return self.to_out(rearrange(out_BHTD, "b h t d -> b t (h d)"))

    @property
    def _budget_linears(self) -> list[nn.Linear]:
        """Each gives a number per head."""
        return [linear for linear in (self.to_learned_k, self.to_gate) if linear is not None]

    def _projected(self, x_BTC: Tensor) -> Tensor:
        """H heads each of queries, keys and values, [B, T, 3H, D]; compiled, more heads hold the columns of
        `_budget_linears`."""
        weight = self.to_qkv.weight
        if self._budget_linears and torch.compiler.is_compiling():
            # Of one product: on a GPU one of so few columns for each takes as long as many do.
            weight = torch.cat((weight, *(linear.weight for linear in self._budget_linears)))
            weight = F.pad(weight, (0, 0, 0, -len(weight) % self.config.head_width))
        return rearrange(F.linear(x_BTC, weight), "b t (g d) -> b t g d", d=self.config.head_width)

    def _budgets(self, x_BTC: Tensor, rest: Tensor) -> list[Tensor]:
        """1 + (attn_k − 1)·sigmoid of `_budget_linears`, [B, H, T] each; `rest`: the heads after the values'."""
        if rest.shape[2]:
            columns = rest.flatten(2).split(self.heads, dim=-1)
            logits = [column + linear.bias for column, linear in zip(columns, self._budget_linears, strict=False)]
        else:
            logits = [linear(x_BTC) for linear in self._budget_linears]
        return [1 + (self.config.attn_k - 1) * rearrange(x, "b t h -> b h t").sigmoid() for x in logits]

    def _placed(self, projected: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query [B, H, T, D]; key and value [B, H, S, D], the null and cached ones in front; the heads after them."""
        H, norms, rotary = self.heads, (self.query_norm, self.key_norm), self.rotary
        # Heads move in front of positions last: in the memory's own order norm, rotation and their gradients are few
        # kernels when compiled, and the gradients of the three are written where the product reads them.
        if norms[0] and norms[1] and rotary and cache is None and self._has_kernels(projected):
            from cda_cli.ops.triton.heads import norm_and_rotate

            gains = norms[0].weight, norms[1].weight
            query, key, value, rest = norm_and_rotate(projected, *gains, rotary.cos, rotary.sin, H, EPS)
        else:
            query, key, value, rest = projected.split((H, H, H, projected.shape[2] - 3 * H), dim=2)
            if norms[0] and norms[1]:
                query, key = norms[0](query), norms[1](key)
            if rotary:
                start = cache.length if cache is not None else 0
                query, key = rotary(query, start), rotary(key, start)
        query, key, value = (rearrange(heads, "b t h d -> b h t d") for heads in (query, key, value))
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        if self.config.null_kv:
            null_key, null_value = self.null_kv.to(key.dtype).unsqueeze(1).expand(-1, len(query), -1, -1, -1)
            key, value = torch.cat((null_key, key), 2), torch.cat((null_value, value), 2)
        return query, key, value, rest

    def _has_kernels(self, projected: Tensor) -> bool:
        """Whether what is around the operator may run as Triton kernels too."""
        if self.backend not in ("auto", "triton") or transformed():
            return False
        if KEEPS and self.computed_again and torch.is_grad_enabled() and torch.compiler.is_compiling():
            return False
        device, dtype, width = projected.device, projected.dtype, self.config.head_width
        return choose_backend(self.backend, "exact", device, dtype, head_width=width).name == "triton"

    def _soft_topk_attention(self, query: Tensor, key: Tensor, value: Tensor, sparsity_k: float | Tensor) -> Tensor:
        return soft_topk_attention(
            query,
            key,
            value,
            sparsity_k,
            eps=self.eps,
            scale=self.scale,
            backend=self.backend,
            largest_k=max(1.0, self.config.attn_k),
            **self.solver,
        )

    def _observed(self, query: Tensor, key: Tensor, value: Tensor, sparsity_k: float | Tensor) -> Tensor:
        """The same output by way of the dense weights, which the observer gets."""
        assert self.observer is not None
        B, H, T, _ = query.shape
        S, null, softmax = key.shape[2], self.config.null_kv, self.config.attention == "softmax"
        key_BHDS = key.float().transpose(-1, -2)
        k = 1.0 if softmax else sparsity_k
        if not isinstance(k, Tensor):
            k = torch.full((), k, device=query.device)  # filled there: a copy would wait for the GPU
        rows = max(1, OBSERVED // (B * H * S))
        outputs = []
        blocks = zip(query.split(rows, 2), k.float().expand(B, H, T).split(rows, 2), strict=True)
        for number, (some, k_BHT) in enumerate(blocks):
            before = S - T + number * rows  # keys that come before the first of these queries
            with torch.autocast(query.device.type, enabled=False):
                scores = self.scale * some.float() @ key_BHDS
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(before)
            if softmax:
                weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            else:
                weights = soft_topk(scores, k_BHT, mask=mask, eps=self.eps, backend=self.backend, **self.solver)
            self.observer(AttentionSeen(self.layer, weights.detach(), k_BHT.detach(), null, before - null))
            outputs.append(weights.to(value.dtype) @ value)
        return torch.cat(outputs, 2)


def _budget_linear(config: ModelConfig) -> nn.Linear:
    linear = nn.Linear(config.dim, config.heads)
    nn.init.constant_(linear.bias, config.learned_k_bias)
    return linear


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    T, S = query.shape[2], key.shape[2]
    if S == T:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
