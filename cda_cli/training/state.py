"""The two parts of a run: `RunContext` is fixed once the run is set up, and `TrainState` changes with each step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cda_cli.config import Config
from cda_cli.data import Batch, Tokenizer, Tokens
from cda_cli.model import Transformer, Truncation, state_tensors
from cda_cli.ops import Choice
from cda_cli.storage import pack_optimizer
from cda_cli.training.accounting.flops import flops_per_token, peak_flops
from cda_cli.training.auxiliary_losses import AuxiliaryLosses
from cda_cli.training.average import WeightAverage
from cda_cli.training.distributed.processes import Processes
from cda_cli.training.distributed.sharding import own_shards
from cda_cli.training.gradients import GradientGraphs
from cda_cli.training.nonfinite import require_finite_weights
from cda_cli.training.optimizer import Optimizer
from cda_cli.version import __version__

# In the state of a checkpoint: the number of CPU threads if the CPU alone computed, or else None.
THREADS = "threads"

Batches = Iterator[tuple[Batch, dict[str, Any]]]  # each with the position in the data after it


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    `open_batches` takes the position to go on from, or None. `windows` counts those of one pass over the training text;
    it is None for streamed text, where the number is unknown. `remark` says what the tokenizer loses of the text.
    `identity`, plain JSON, tells this text and its tokens from others: by the tokens themselves or, if they are
    streamed, by the files (see `fingerprint`). `prompt` is one for a person to try the model with.
    """

    tokenizer: Tokenizer
    validation: Tokens
    description: str
    windows: int | None
    remark: str | None
    open_batches: Callable[[Mapping[str, Any] | None], Batches]
    identity: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = "The "


@dataclass(frozen=True)
class RunContext:
    """What a run computes with.

    `backend` is the backend of the layers, chosen once. `compiled` is what training calls: the model, or a wrapper of
    it. `truncation` is what truncated steps do with rows of attention, if the run has any. `graphs` holds the gradients
    of steps that are truncated (True) or not (False) as CUDA graphs; it is empty if none are captured.
    `inspection_stream` is the stream on which an inspection runs beside a step; only a single process on a GPU has one.
    """

    config: Config
    device: torch.device
    dtype: torch.dtype
    backend: Choice
    data: RunData
    processes: Processes
    compiled: nn.Module
    is_compiled: bool
    truncation: Truncation | None
    graphs: Mapping[bool, GradientGraphs]
    inspection_stream: torch.cuda.Stream | None

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOPs utilisation, `mfu_computed` and `mfu_dense` (see `flops`); empty if no peak is known."""
        peak = peak_flops(self.device, self.dtype)
        if peak is None:
            return {}
        flops = flops_per_token(self.config, self.backend.name, self.device, self.dtype)
        return {
            f"mfu_{name}": tokens_per_second * value / (peak * self.processes.count)
            for name, value in flops._asdict().items()
        }


class CheckpointContents(NamedTuple):
    """What a checkpoint holds, under the names of the arguments of `storage.publish`."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]
    ema: dict[str, Tensor] | None
    tokenizer_json: str | None


@dataclass
class TrainState:
    """A run after `step` steps, which took `tokens` tokens.

    `position` is the position in the data, None before the first step; `batches` may have been read further. `average`
    is the moving average of the weights, if the run keeps one. `validation_loss` is the loss of this very step, if it
    was measured.
    """

    model: Transformer
    auxiliary: AuxiliaryLosses
    optimizer: Optimizer
    average: WeightAverage | None
    batches: Batches
    step: int
    tokens: int
    position: dict[str, Any] | None
    validation_loss: float | None = None

    def checkpoint(self, context: RunContext) -> CheckpointContents:
        """Returns what a checkpoint of this moment holds: of each tensor the rows that this process writes.

        All processes must call this. Raises TrainingError if a weight among these rows is not finite.
        """
        config, data, processes = context.config, context.data, context.processes
        model = own_shards(state_tensors(self.model), processes)
        average = own_shards(self.average.tensors(), processes) if self.average else None
        require_finite_weights(self.step, model)
        require_finite_weights(self.step, {f"the average of {name}": one for name, one in (average or {}).items()})
        optimizer, plain = pack_optimizer(self.optimizer.state_dict())
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "position": self.position,
            "data": data.identity,
            "validation_loss": self.validation_loss if math.isfinite(self.validation_loss or 0.0) else None,
            "config": config.model_dump(mode="json"),
            "optimizer": plain,
            **self.auxiliary.state(),
            THREADS: torch.get_num_threads() if context.device.type == "cpu" and processes.count == 1 else None,
            "versions": {"cda": __version__, "torch": str(torch.__version__), "python": sys.version.split()[0]},
        }
        return CheckpointContents(
            step=self.step,
            model=model,
            optimizer=own_shards(optimizer, processes),
            rng=processes.random_states(context.device),
            state=state,
            ema=average,
            tokenizer_json=data.tokenizer.to_json(),
        )
