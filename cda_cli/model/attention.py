"""Causal self-attention: projections, positions, cache and output. A rule (`rules`) turns scores into weights.

Shapes: B batch, T queries, C width of the residual stream, H heads, K key heads (each for H/K neighbouring heads),
D head width, S keys (null and cached ones first), G heads of the projection.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from cda_cli.config import ModelConfig
from cda_cli.model.alibi import AlibiPositions
from cda_cli.model.auxiliary_losses import ExcessSupport
from cda_cli.model.cache import CachedStep, KeyValueCache
from cda_cli.model.context_parallel import ContextPart
from cda_cli.model.edits import EditLayer
from cda_cli.model.head_projection import PackedProjection, head_logits, project_heads
from cda_cli.model.layers import head_linear, make_head_norm
from cda_cli.model.left_padding import Start, padding_first, padding_or_text
from cda_cli.model.length_scaling import SCALINGS
from cda_cli.model.observe import ObservedAttention, Observer
from cda_cli.model.rotary import RotaryPositions, rotate
from cda_cli.model.rules import EditRows, attention_rule
from cda_cli.ops import Backend, HeadBudgets, can_run_kernels, heads_of_step, norm_and_rotate

# When a compiled block is recomputed in the backward, PyTorch 2.11 keeps what an autograd.Function has saved.
COMPILED_RECOMPUTE_KEEPS_SAVED = torch.__version__ < "2.13"
# A step of AdamW changes a parameter by about the learning rate. With 1e-3 a learned ε can change e-fold in 100 steps.
LOG_EPS_SCALE = 10.0


class Attention(nn.Module):
    query_scale: Tensor | None

    def __init__(self, config: ModelConfig, layer: int, backend: Backend) -> None:
        super().__init__()
        self.config, self.layer, self.backend = config, layer, backend
        self.heads, self.key_heads = config.heads, config.key_heads
        self.rule = attention_rule(config, backend)
        self.eps = config.attn_eps  # the current temperature of the weights
        # ε anneals as a factor on the query. The factor is a tensor, since compiled code and CUDA graphs would keep a
        # number constant. It follows from the step, so no checkpoint holds it.
        as_scale = config.eps_anneal_start is not None and self.rule.divides_by_eps
        self.register_buffer("query_scale", torch.ones((), dtype=torch.float32) if as_scale else None, persistent=False)
        self.observer: Observer | None = None
        self.observed_apart = 1  # The observer sees one query in so many.
        self.edit_rows: EditRows | None = None
        self.edit_budget: EditLayer | None = None
        self.auxiliary_loss: ExcessSupport | None = None  # of training, where gradients are taken
        self.context_part: ContextPart | None = None  # Several processes share the queries of each sequence.
        self.is_recomputed = False  # Activation checkpointing computes this layer again in the backward.

        inner, of_keys = config.heads * config.head_width, config.key_heads * config.head_width
        self.to_qkv = nn.Linear(config.dim, inner + 2 * of_keys, bias=config.attn_bias != "none")
        self.to_out = nn.Linear(inner, config.dim, bias=config.attn_bias == "all")
        self.null_kv = nn.Parameter(torch.empty(2, config.key_heads, config.null_kv, config.head_width))
        nn.init.normal_(self.null_kv)
        self.query_norm, self.key_norm = make_head_norm(config), make_head_norm(config)
        rotary = config.position == "rotary" and layer not in config.nope_layers
        self.rotary = RotaryPositions(config) if rotary else None
        self.alibi = AlibiPositions(config) if config.position == "nape" else None
        scaled = config.length_scaling
        self.length_scaling = SCALINGS[scaled](config) if scaled != "none" else None
        learns_eps = config.learned_eps and self.rule.has_eps
        self.log_eps = nn.Parameter(torch.zeros(config.heads)) if learns_eps else None
        self.divides_by_k = config.normalise == "k" and self.rule.has_budget
        self.to_learned_k = (
            head_linear(config.dim, config.heads, config.learned_k_bias) if self.rule.learns_budget else None
        )
        self.gate_is_unit = config.output_gate_range == "unit"
        self.largest_gate = config.output_gate_max or config.attn_k
        gate_bias = 0.0 if self.gate_is_unit else config.learned_k_bias
        self.to_gate = head_linear(config.dim, config.heads, gate_bias) if config.output_gate else None

    def set_eps(self, eps: float) -> None:
        """Changes the temperature ε of the weights: scores/ε = (scale · attn_eps/ε) · query·key / attn_eps."""
        if self.query_scale is None:
            self.rule.eps = eps
            self.eps = eps
        elif eps != self.eps:
            self.eps = eps
            self.fill_buffers()

    def fill_buffers(self) -> None:
        """Computes the factor on the query, which no checkpoint holds."""
        if self.query_scale is not None:
            self.query_scale.fill_(self.rule.eps / self.eps)

    def pack_projection(self) -> None:
        """Packs all that is projected for the heads into one matrix, for a model that is not trained."""
        if self._head_linears:
            self.to_qkv = PackedProjection(self.to_qkv, self._head_linears, self.config.head_width)

    def forward(self, x_BTC: Tensor, cache: KeyValueCache | None = None, padding_B: Tensor | None = None) -> Tensor:
        linears = self._head_linears
        projected = project_heads(x_BTC, self.to_qkv, linears, self.config.head_width)
        if isinstance(cache, CachedStep) and self._has_kernels_of_step(projected):
            query, key, value, packed, learned_BHT = self._heads_of_step(projected, cache)
        else:
            query, key, value, packed = self._prepare_heads(projected, cache, padding_B)
            learned_BHT = None
        if self.log_eps is not None:
            query = query * (-LOG_EPS_SCALE * self.log_eps).exp().to(query.dtype).view(-1, 1, 1)
        logits = partial(head_logits, x_BTC, packed, linears)
        if self.length_scaling is not None:
            query = self.length_scaling(query, self._start(cache), padding_B, logits)
        documents = None if padding_B is None else padding_or_text(padding_B, key.shape[2])
        if learned_BHT is None and "k" in linears:
            learned_BHT = _one_to(self.config.attn_k, logits("k"))
        budget = self._constant_budget if learned_BHT is None else learned_BHT
        gate_logits = logits("gate") if "gate" in linears else None
        if self.edit_budget is not None:
            if not isinstance(budget, Tensor):
                dtype = torch.promote_types(query.dtype, torch.float32)
                budget = query.new_full(query.shape[:3], budget, dtype=dtype)
            budget = self.edit_budget(self.layer, budget)
        if self.context_part is None or cache is not None:
            out_BHTD = self._attend(query, key, value, budget, gate_logits, documents, cache)
        else:
            # Each of two chunks is a run of queries, the last of which sees the keys up to its own.
            of_chunks = []
            for rows, stop in self.context_part.halves(query.shape[2], self.config.null_kv):
                seen = key[:, :, :stop], value[:, :, :stop]
                k = budget[:, :, rows] if isinstance(budget, Tensor) else budget
                logits_of_rows = gate_logits[:, :, rows] if gate_logits is not None else None
                of_keys = documents[:, :stop] if documents is not None else None
                of_chunks.append(self._attend(query[:, :, rows], *seen, k, logits_of_rows, of_keys))
            out_BHTD = torch.cat(of_chunks, 2)
        if self.divides_by_k:
            out_BHTD = out_BHTD / (budget.unsqueeze(-1) if isinstance(budget, Tensor) else budget)
        if gate_logits is not None:
            out_BHTD = out_BHTD * self._gate(gate_logits).unsqueeze(-1)
        return self.to_out(out_BHTD.transpose(1, 2).flatten(2))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        budget: float | Tensor,
        gate_logits: Tensor | None,
        documents: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Returns the output of the rule, [B, H, T, D], for queries that stand at the last of the keys."""
        if self.auxiliary_loss is not None and torch.is_grad_enabled():
            parts = 1 if self.context_part is None else self.context_part.count
            query = self.auxiliary_loss(self.rule, query, key, budget, parts)
        visible_B = cache.visible_B if cache is not None else None
        if self.observer is not None or self.edit_rows is not None:
            observe = None
            if self.observer is not None:
                observe = partial(self._observe, self._output_scale(budget, gate_logits, query))
            if observe is None or self.observed_apart == 1:
                watch = (observe, self.edit_rows)
                return self.rule.attend_densely(query, key, value, budget, *watch, documents, visible_B)
            assert (cache, documents, self.edit_rows) == (None, None, None), "some queries of whole texts alone"
            self.rule.observe_some(query, key, value, budget, observe, self.observed_apart)
        if cache is not None and (visible_B is not None or self._decodes(query, documents)):
            return cache.decode(self.layer, self.rule, query, key, value, budget)
        return self.rule.attend(query, key, value, budget, documents)

    def _start(self, cache: KeyValueCache | None) -> Start:
        """Where the first of the queries stands, or the part of a sequence that they are."""
        return cache.length if cache is not None else self.context_part or 0

    @staticmethod
    def _decodes(query_BHTD: Tensor, documents: Tensor | None) -> bool:
        """Whether one query of each row sees all of its keys, and no gradient is asked for, which decoding lacks."""
        alone = documents is None and query_BHTD.shape[2] == 1
        return alone and not (torch.is_grad_enabled() and query_BHTD.requires_grad)

    @property
    def _head_linears(self) -> dict[str, nn.Linear]:
        """The linears that make a number for each head, or for each of some heads."""
        scaling = self.length_scaling.linears if self.length_scaling is not None else {}
        linears = {"k": self.to_learned_k, "gate": self.to_gate, **scaling}
        return {name: linear for name, linear in linears.items() if linear is not None}

    @property
    def _constant_budget(self) -> float:
        """The k of each row where it is not learned."""
        return self.config.attn_k if self.rule.has_budget else 1.0

    def _gate(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.gate_is_unit else _one_to(self.largest_gate, logits)

    def _output_scale(self, budget: float | Tensor, logits_BHT: Tensor | None, query_BHTD: Tensor) -> Tensor:
        """What the layer multiplies the output of each row by, [B, H, T]."""
        scale = query_BHTD.new_ones(query_BHTD.shape[:3], dtype=torch.float32)
        if self.divides_by_k:
            scale = scale / budget
        return scale if logits_BHT is None else scale * self._gate(logits_BHT)

    def null_heads(self, null_kv: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the null keys and their values, [K, N, D] each, of the whole parameter `null_kv`."""
        null_key, null_value = null_kv
        return (null_key if self.alibi is None else self.alibi.null_keys(null_key)), null_value

    def _prepare_heads(
        self, projected_BTGD: Tensor, cache: KeyValueCache | None, padding_B: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns query [B, H, T, D], key and value [B, K, S, D], and the packed heads.

        Null keys come first and cached ones next. In a padded row, its padding stands in front of all of them.
        """
        H, K, norms = self.heads, self.key_heads, (self.query_norm, self.key_norm)
        part = self.context_part if cache is None else None
        # Heads move in front of positions only at the end. Norm, rotation and their gradients thus keep the order of
        # the memory: they compile to few kernels, and the three gradients lie where the matrix product reads them.
        tables = None
        start, T = self._start(cache), projected_BTGD.shape[1]
        if self.rotary is not None:
            step = cache if isinstance(cache, CachedStep) else None
            tables = self.rotary.at(start, T, padding_B) if step is None else step.rotary_tables(self.rotary)
        one_after_another = padding_B is None and not isinstance(cache, CachedStep)
        if norms[0] and norms[1] and tables and one_after_another and self._has_kernels(projected_BTGD):
            # Rotation is linear, so a factor on the gain is a factor on the query, without a pass over the query.
            gain = norms[0].weight if self.query_scale is None else norms[0].weight * self.query_scale
            gains = gain, norms[1].weight
            query, key, value, packed = norm_and_rotate(projected_BTGD, *gains, *tables, H, K, norms[0].eps)
        else:
            rest = projected_BTGD.shape[2] - H - 2 * K
            if norms[0] and norms[1] and tables and not torch.is_grad_enabled():
                # A step of decoding on a CPU takes as long as its calls are many. Together there are half as many. With
                # a gradient, whose sums would have another order, old runs resume to the same bits.
                both, value, packed = projected_BTGD.split((H + K, K, rest), dim=2)
                query, key = rotate(norms[0].together(norms[1], both, H), tables).split((H, K), dim=2)
            else:
                query, key, value, packed = projected_BTGD.split((H, K, K, rest), dim=2)
                if norms[0] and norms[1]:
                    query, key = norms[0](query), norms[1](key)
                if tables:
                    query, key = rotate(query, tables), rotate(key, tables)
                if self.alibi is not None:
                    query, key = self.alibi(query, key, start, padding_B)
            if self.query_scale is not None:
                query = query * self.query_scale
        query, key, value = (heads_BTHD.transpose(1, 2) for heads_BTHD in (query, key, value))
        if part is not None:
            key, value = part.whole(torch.stack((key, value)), 3)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        if self.config.null_kv and not (cache is not None and cache.holds_null_keys):
            null_key, null_value = (
                null_KND.to(key.dtype).expand(len(query), -1, -1, -1) for null_KND in self.null_heads(self.null_kv)
            )
            key, value = torch.cat((null_key, key), 2), torch.cat((null_value, value), 2)
        if self.config.null_kv and padding_B is not None:
            key, value = (padding_first(heads, self.config.null_kv, padding_B) for heads in (key, value))
        return query, key, value, packed

    def _heads_of_step(
        self, projected_B1GD: Tensor, step: CachedStep
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What `_prepare_heads` does, by one kernel, and the learned k [B, H, 1], if its logits are packed."""
        norm, other = self.query_norm, self.key_norm
        packed = projected_B1GD[:, :, self.heads + 2 * self.key_heads :]
        most, linear = self.config.attn_k, self.to_learned_k
        budgets = HeadBudgets(linear.bias, most) if linear is not None and packed.shape[2] else None
        keys, values = step.layer(self.layer)
        query, budget = heads_of_step(
            projected_B1GD.squeeze(1),
            keys,
            values,
            step.length,
            self.heads,
            null_keys=step.cache.null_keys,
            gains=(norm.weight, other.weight) if norm is not None and other is not None else None,
            eps=norm.eps if norm is not None else 0.0,
            tables=(self.rotary.cos, self.rotary.sin) if self.rotary is not None else None,
            query_scale=self.query_scale,
            budgets=budgets,
        )
        budget = budget.unsqueeze(2) if budget is not None else None
        return query.unsqueeze(2), keys, values, packed, budget

    def _has_kernels(self, projected: Tensor) -> bool:
        """Whether Triton kernels can compute norm and rotation."""
        recomputed = self.is_recomputed and torch.is_grad_enabled() and torch.compiler.is_compiling()
        if COMPILED_RECOMPUTE_KEEPS_SAVED and recomputed:
            return False
        return can_run_kernels(self.backend, projected.device, projected.dtype, self.config.head_width)

    def _has_kernels_of_step(self, projected: Tensor) -> bool:
        """Whether a Triton kernel can do so for one position a row. It has no gradient, and the compiler needs none."""
        is_plain = self.alibi is None and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        return is_plain and self._has_kernels(projected)

    def _observe(
        self,
        scale_BHT: Tensor,
        weights_BHtS: Tensor,
        budget_BHt: Tensor,
        query_BHtD: Tensor,
        key_BHSD: Tensor,
        value_BHSD: Tensor,
        last: int,
    ) -> None:
        assert self.observer is not None
        null, (t, S) = self.config.null_kv, weights_BHtS.shape[2:]
        apart = self.observed_apart
        row = last - (S - scale_BHT.shape[2])  # of the whole call: the first of this block
        rows = (weights_BHtS.detach(), budget_BHt.detach())
        output = (value_BHSD.detach(), self.to_out.weight.detach(), scale_BHT[:, :, row::apart][:, :, :t].detach())
        # The factor that anneals ε on the query belongs to ε, and not to the scores.
        scores_of = (query_BHtD.detach() * (self.eps / self.rule.eps), key_BHSD.detach())
        self.observer(ObservedAttention(self.layer, *rows, null, last - null, *output, *scores_of, apart=apart))


def _one_to(largest: float, logits: Tensor) -> Tensor:
    return 1 + (largest - 1) * logits.sigmoid()
