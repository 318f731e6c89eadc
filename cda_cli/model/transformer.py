"""The decoder-only Transformer: embeddings, blocks, logits.

Shapes: B batch, T positions, C width of the residual stream, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from cda_cli.config import ModelConfig
from cda_cli.model.activations import feed_forward_activation
from cda_cli.model.alibi import AlibiPositions
from cda_cli.model.attention import Attention
from cda_cli.model.cache import CachedStep, KeyValueCache
from cda_cli.model.context_parallel import ContextPart
from cda_cli.model.feed_forward import FeedForward
from cda_cli.model.layers import add_then_norm, make_dropout, make_norm
from cda_cli.model.left_padding import Start, row_positions
from cda_cli.model.loss import vocabulary_loss
from cda_cli.model.rotary import RotaryPositions
from cda_cli.model.rules import AttentionRule, attention_rule
from cda_cli.ops import Backend, Choice

# The modules with buffers that no checkpoint holds, which their `fill_buffers` computes.
WITH_BUFFERS = (AlibiPositions, Attention, RotaryPositions)


class Block(nn.Module):
    """A pre-norm block: each branch reads the normalised residual stream and adds its output to the stream."""

    def __init__(self, config: ModelConfig, layer: int, backend: Backend) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = make_norm(config), make_norm(config)
        self.attention = Attention(config, layer, backend)
        self.feed_forward = FeedForward(config, layer, backend)
        self.dropout = make_dropout(config)

    def forward(self, x_BTC: Tensor, cache: KeyValueCache | None = None, padding_B: Tensor | None = None) -> Tensor:
        h = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC), cache, padding_B))
        return h + self.dropout(self.feed_forward(self.feed_forward_norm(h)))

    def step(self, x_B1C: Tensor, branch_B1C: Tensor | None, cache: CachedStep) -> tuple[Tensor, Tensor]:
        """What `forward` does with one position of each row, without dropout and a gradient, in fewer kernels.

        Takes and returns the residual stream and the output of a branch that is to be added to it.
        """
        backend = self.attention.backend
        h, normed = add_then_norm(x_B1C, branch_B1C, self.attention_norm, backend)
        h, normed = add_then_norm(h, self.attention(normed, cache), self.feed_forward_norm, backend)
        return h, self.feed_forward(normed)


class Transformer(nn.Module):
    """The model that `config` describes. `backend` chooses the code that computes the operator, not the model."""

    def __init__(self, config: ModelConfig, backend: Backend = "auto") -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        learned = config.position == "learned"
        self.position_embedding = nn.Embedding(config.seq_len, config.dim) if learned else None
        self.dropout = make_dropout(config)
        self.blocks = nn.ModuleList(Block(config, layer, backend) for layer in range(config.depth))
        self.norm = make_norm(config)
        bias = config.logits_bias and not config.tied_embeddings
        self.to_logits = nn.Linear(config.dim, config.vocab_size, bias=bias)
        if config.tied_embeddings:
            self.to_logits.weight = self.token_embedding.weight
        self.activation_checkpointing = False
        self.context_part: ContextPart | None = None
        self._scale_initial_weights()

    def forward(
        self,
        tokens_BT: Tensor,
        cache: KeyValueCache | None = None,
        targets_BT: Tensor | None = None,
        padding_B: Tensor | None = None,
        wanted_B: Tensor | None = None,
    ) -> Tensor:
        """Returns the logits [B, T, V] of tokens [B, T], int64, in the dtype of the computation.

        With a cache, the tokens follow the positions that it holds. `padding_B` says how many of the first tokens of
        each row, cached ones included, are padding (see `left_padding`). `wanted_B`, int64 [B], is the one place
        of each row, among its T, whose logits are computed, as [B, 1, V]. With targets [B, T] the model returns their
        cross-entropy instead: nats, float32 [B, T], 0 if a target is IGNORE. The model computes it so that
        torch.compile can fuse it; otherwise the logits and their gradient would be written once more in float32.

        Raises ValueError if the positions exceed the context.
        """
        if isinstance(cache, CachedStep):
            return self._logits_of_step(tokens_BT, cache)
        part = self.context_part if cache is None else None
        if part is not None:
            tokens_BT = part.own(tokens_BT, 1)
        x_BTC = self.stream(tokens_BT, cache, padding_B)
        if part is not None:
            if targets_BT is not None:
                return part.whole(self.head(x_BTC, part.own(targets_BT, 1)), 1)
            x_BTC = part.whole(x_BTC, 1)
        if wanted_B is not None:
            x_BTC = x_BTC.take_along_dim(wanted_B.view(-1, 1, 1), 1)
        return self.head(x_BTC, targets_BT)

    def split_context(self, part: ContextPart) -> None:
        """From now on each process of a group computes a part of each sequence, unless it is given a cache.

        `forward` takes and returns what it does in one process, in all of them.
        """
        self.context_part = part
        for block in self.each_block():
            block.attention.context_part = part

    def stream(self, tokens_BT: Tensor, cache: KeyValueCache | None = None, padding_B: Tensor | None = None) -> Tensor:
        """Returns the residual stream after the last block, [B, T, C], for the arguments of `forward`.

        After `split_context` these are the tokens and the stream of this process.
        """
        start: Start = cache.length if cache is not None else self.context_part or 0
        T = tokens_BT.shape[1]
        stop = T * start.count if isinstance(start, ContextPart) else start + T
        if isinstance(stop, int) and stop > self.config.seq_len:
            raise ValueError(f"{stop} positions exceed the context of {self.config.seq_len}")
        x_BTC = self.dropout(self._embedded(tokens_BT, start, padding_B))
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Without dropout a block draws no random numbers, so the checkpoint need not keep their state.
                draws = self.config.dropout > 0
                x_BTC = checkpoint(block, x_BTC, cache, padding_B, use_reentrant=False, preserve_rng_state=draws)
            else:
                x_BTC = block(x_BTC, cache, padding_B)
        if cache is not None:
            cache.advance(T)
        return x_BTC

    def _embedded(self, tokens_BT: Tensor, start: Start, padding_B: Tensor | None = None) -> Tensor:
        x_BTC: Tensor = self.token_embedding(tokens_BT)
        if self.position_embedding is None:
            return x_BTC
        return x_BTC + self.position_embedding.weight[row_positions(start, tokens_BT.shape[1], padding_B)]

    def _logits_of_step(self, tokens_B1: Tensor, cache: CachedStep) -> Tensor:
        """What `forward` does with one position of each row, by the steps of its blocks."""
        x_B1C: Tensor = self._embedded(tokens_B1, cache.length)
        branch: Tensor | None = None
        for block in self.each_block():
            x_B1C, branch = block.step(x_B1C, branch, cache)
        cache.advance(1)
        _, normed = add_then_norm(x_B1C, branch, self.norm, self.backend)
        return cast(Tensor, self.to_logits(normed))

    @property
    def activation_checkpointing(self) -> bool:
        """Whether autograd keeps only the input of each block and computes the block again in the backward."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, wanted: bool) -> None:
        self._activation_checkpointing = wanted
        for block in self.each_block():
            block.attention.is_recomputed = wanted

    def head(self, x_BTC: Tensor, targets_BT: Tensor | None) -> Tensor:
        """Turns the residual stream of the last block into what `forward` returns."""
        x_BTC = self.norm(x_BTC)
        if targets_BT is None:
            return cast(Tensor, self.to_logits(x_BTC))
        return vocabulary_loss(x_BTC, self.to_logits, targets_BT)

    def compile_parts(self) -> None:
        """Compiles each block, and the head, by itself, so that uncompiled code can run between them."""
        for block in self.each_block():
            block.compile()
        self.head = torch.compile(self.head)  # type: ignore[method-assign]

    def each_block(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]

    @property
    def attention_rule(self) -> AttentionRule:
        """The attention rule, which all layers have in common."""
        return self.each_block()[0].attention.rule

    @property
    def fits_cuda_graph(self) -> bool:
        """Whether a CUDA graph can hold a pass on the device of the model."""
        device = self.token_embedding.weight.device
        return fits_cuda_graph(self.config, self.attention_rule.choose_backend(device), device)

    @property
    def attention_eps(self) -> float | None:
        """The current ε of the attention weights, or None if the rule has no ε."""
        return self.each_block()[0].attention.eps if self.attention_rule.has_eps else None

    @property
    def attention_description(self) -> str:
        """The attention rule in a few words, with its k, its solver and its ε."""
        return self.attention_rule.description(self.attention_eps)

    def fill_buffers(self) -> None:
        """Computes the buffers, which no checkpoint holds, of a model whose memory has just been allocated."""
        for module in self.modules():
            if isinstance(module, WITH_BUFFERS):
                module.fill_buffers()

    def set_attention_eps(self, eps: float) -> None:
        """Sets the ε of every attention layer, for annealing."""
        for block in self.each_block():
            block.attention.set_eps(eps)

    def parameter_count(self) -> int:
        """The number of parameters; a shared one counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _scale_initial_weights(self) -> None:
        """With tied embeddings, makes the first logits small and scales each branch by 1/√(2·depth).

        Without tied embeddings all weights stay as PyTorch draws them, which is how the published model starts.
        """
        # On the device meta there are no values, and PyTorch would import SymPy to divide them.
        if not self.config.tied_embeddings or self.token_embedding.weight.is_meta:
            return
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.each_block():
            for linear in (block.attention.to_out, block.feed_forward.proj_out):
                linear.weight.data /= math.sqrt(2 * self.config.depth)


def uses_soft_topk(config: ModelConfig) -> bool:
    """Whether any layer selects with the soft top-k operator."""
    return attention_rule(config).uses_operator or feed_forward_activation(config).uses_operator


def fits_cuda_graph(config: ModelConfig, choice: Choice, device: torch.device) -> bool:
    """Whether a CUDA graph can hold a pass: not with the operator in PyTorch, which branches on its results."""
    return device.type == "cuda" and (choice.name == "triton" or not uses_soft_topk(config))


class _NoInitialValues(TorchFunctionMode):
    """Leaves out the functions of `torch.nn.init`.

    On the device meta they change nothing, but PyTorch imports its compiler for them, which takes longer than all else
    that a command does before it reads a checkpoint. `torch.randn` would import SymPy there.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return None
        return func(*args, **(kwargs or {}))


def model_of_shapes(config: ModelConfig, backend: Backend = "auto") -> Transformer:
    """Returns a model on the device meta: its parameters have names, shapes and dtypes, and take no memory."""
    with torch.device("meta"), _NoInitialValues():
        return Transformer(config, backend)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns the name, shape and dtype of each tensor in a checkpoint of this model, without allocating any."""
    tensors = state_tensors(model_of_shapes(config))
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def state_tensors(model: Transformer) -> dict[str, Tensor]:
    """Returns the tensors that a checkpoint holds: those of the state dict, with a shared tensor once."""
    state: dict[str, Tensor] = model.state_dict()
    if model.config.tied_embeddings:
        del state["to_logits.weight"]
    return state


def load_state_tensors(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Loads tensors that `state_tensors` returned. Raises RuntimeError if they are not those of `model`."""
    if model.config.tied_embeddings:
        tensors = tensors | {"to_logits.weight": tensors["token_embedding.weight"]}
    model.load_state_dict(tensors)
