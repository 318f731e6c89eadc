"""GPT-2's model and training step in plain PyTorch, as in nanoGPT (github.com/karpathy/nanoGPT).

`cda`'s own step is compared with it. The model has learned positions, LayerNorm and biases, GELU, tied embeddings and
SDPA. The loss is inside the compiled model, AdamW is fused, autocast takes bf16, batches come from pinned memory, and
the host reads the loss once in ten steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cda_cli.config import Config
from cda_cli.runtime import peak_memory

LOG_EVERY = 10


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_2, self.wide, self.narrow = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.narrow(F.gelu(self.wide(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.tokens, self.positions = nn.Embedding(model.vocab_size, model.dim), nn.Embedding(model.seq_len, model.dim)
        self.blocks = nn.ModuleList(Block(model.dim, model.heads) for _ in range(model.depth))
        self.norm = nn.LayerNorm(model.dim)
        self.logits = nn.Linear(model.dim, model.vocab_size, bias=False)
        self.logits.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        logits = self.logits(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)


def measure(
    config: Config, next_batch: Callable[[], tuple[Tensor, Tensor]], device: torch.device, warm: int, steps: int
) -> tuple[float, int]:
    """Returns the seconds of a step, and the peak of memory in bytes, over `steps` steps after `warm` ones.

    `next_batch` returns inputs and targets [B, T] on the CPU.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    optim = config.optim
    model = GPT(config).to(device)
    compiled = torch.compile(model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=fused)

    def load() -> tuple[Tensor, Tensor]:
        inputs, targets = next_batch()
        if not fused:
            return inputs, targets
        return inputs.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)

    inputs, targets = load()
    began = 0.0
    for step in range(warm + steps):
        if step == warm:
            _wait(device)
            if fused:
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = optim.lr
        for _ in range(optim.grad_accum):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = compiled(inputs, targets) / optim.grad_accum
            inputs, targets = load()  # while the device computes
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0:
            loss.item()
    _wait(device)
    return (time.perf_counter() - began) / steps, peak_memory(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
