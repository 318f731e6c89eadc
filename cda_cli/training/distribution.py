"""One run in several processes, on PyTorch's own engine: DDP and FSDP2 (`fully_shard`).

Every process reads the whole order of the data and takes its rows of each step; gradients, the loss and a request to
stop are put together; the first process (rank 0) alone speaks and writes. The loop is the same for one process, where
all of this does nothing.

W processes, B = batch_size, A = grad_accum.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from hashlib import blake2b
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cda_cli.config import Config
from cda_cli.data import Batch
from cda_cli.errors import DeviceError
from cda_cli.model import Transformer
from cda_cli.runtime import pick_device, random_states, restore_random_states
from cda_cli.signals import StopRequest
from cda_cli.training.launch import ERROR, POLL, OneVoice, Place

# One process may write a large checkpoint while the others wait in a collective.
TIMEOUT = timedelta(hours=1)

# The buffers are tables that nothing changes. The option was renamed in torch 2.13.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_CONSTANT_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class Processes:
    """The processes of a run, seen from one of them. Made by `join`; ALONE is a run in one process."""

    def __init__(self, place: Place, store: Any = None) -> None:
        self._place, self._store = place, store
        self.count = place.processes
        self.first = place.rank == 0

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # After an error the others may wait for this one where it will never come: then its end is theirs.
        if self.count > 1 and error is None:
            dist.destroy_process_group()

    # What one says and the others hear.

    def say(self, key: str, word: str = "") -> None:
        if self.count > 1:
            self._store.set(key, word)

    def hear(self, key: str) -> str:
        """Waits for as long as it takes, and can be interrupted, unlike a collective."""
        while not self._store.check([key]):
            if self._store.check([ERROR]):
                sys.exit(int(self._store.get(ERROR)))  # it has been said
            time.sleep(POLL)
        return cast(bytes, self._store.get(key)).decode()

    def told(self, key: str, find: Callable[[], str]) -> str:
        """What the first process finds, in all."""
        if not self.first:
            return self.hear(key)
        word = find()
        self.say(key, word)
        return word

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process, then the first of each other machine, then all: what is cached is made once."""
        place = self._place
        if place.local_rank:
            self.hear(f"done/{place.machine}")
        elif place.rank:
            self.hear("done")
        yield
        if place.rank == 0:
            self.say("done")
        if place.local_rank == 0:
            self.say(f"done/{place.machine}")

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1))

    # The work of a step.

    def batches(self, grad_accum: int) -> int:
        """Of a step in each process, see `share`."""
        return grad_accum // math.gcd(grad_accum, self.count)

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """This process's rows of a step's A batches of B rows: A·B/W of them, in batches of at most B.

        Whole batches as far as A and W have common factors, for whose sake a batch is large; then parts of batches.
        """
        if self.count == 1:
            return list(batches)
        parts = self.count // math.gcd(len(batches), self.count)
        group, part = divmod(self._place.rank, parts)
        rows = len(batches[0].inputs) // parts
        here = slice(part * rows, (part + 1) * rows)
        return [batch.map(lambda values: values[here]) for batch in batches[group :: self.count // parts]]

    def accumulating(self, model: nn.Module, number: int, batches: int) -> AbstractContextManager[object]:
        """For batch `number` of a step's `batches`, from 1: within it forward and backward add to this process's
        gradients, and with the last one the mean over all processes is taken."""
        last = number == batches
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
            return nullcontext() if batches == 1 else _kept_gathered(model)
        if isinstance(model, DistributedDataParallel) and not last:
            return cast(AbstractContextManager[object], model.no_sync())
        return nullcontext()

    def gather_ahead(self, model: nn.Module) -> None:
        """Once the optimizer's kernels are launched: fsdp gathers the new weights while the host goes on to the next
        forward pass, be it of training or not, which waits for them. Until then nothing may write to the weights."""
        if isinstance(model, FSDPModule):
            model.unshard(async_op=True)

    def sum(self, value: Tensor) -> Tensor:
        """Of each process's `value`, which is overwritten; the same bits everywhere."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.sum(torch.tensor(int(here))))

    def of_first(self, value: float) -> float:
        """The first process's `value`: what is decided by it is then the same in all."""
        if self.count == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(told, 0)
        return told.item()

    def agreed(self, stop: StopRequest) -> StopRequest:
        return AgreedStop(stop) if self.count > 1 else stop

    # The model and its checkpoint.

    def device(self, name: str) -> torch.device:
        """The device of this process: `cuda` is then the GPU of its number on this machine."""
        device = pick_device(name)
        if self.count == 1 or device.type == "cpu":
            return device
        if self._place.local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"{self._place.local_processes} processes want a GPU each and this machine has "
                f"{torch.cuda.device_count()}; start as many, or give --device cpu"
            )
        return torch.device("cuda", self._place.local_rank)

    def wrap(self, model: Transformer, config: Config, dtype: torch.dtype, compiled: bool) -> nn.Module:
        """The module to call in place of `model`, whose parameters may become sharded ones: build optimizers after it.

        Compiled whole, so that with ddp the gradients travel after the last backward pass of a step and not during it:
        that costs less than what many small compiled parts cost the host. Block by block only where fsdp gathers and
        frees the weights of one block after the other.
        """
        if self.count == 1:
            return cast(nn.Module, torch.compile(model)) if compiled else model
        # An empty parameter (no null keys) has nothing to share, and DDP would wait for its gradient.
        empty = {parameter for parameter in model.parameters() if not parameter.numel()}
        for parameter in empty:
            parameter.requires_grad_(False)
        if config.run.parallel == "fsdp":
            by_block = self.batches(config.optim.grad_accum) == 1
            if compiled and by_block:
                model.compile_parts()
            elif compiled:
                model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
            return _shard(model, dtype, empty, by_block)
        called: nn.Module = model
        if compiled:
            torch._dynamo.config.optimize_ddp = False  # which would cut the graph
            called = cast(nn.Module, torch.compile(model))
        return DistributedDataParallel(called, gradient_as_bucket_view=True, **_CONSTANT_BUFFERS)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, sharded ones put together one at a time, in the first process; nothing in the others."""
        kept = {}
        for name, tensor in tensors.items():
            complete = whole(tensor)
            if self.first:
                kept[name] = complete.cpu() if complete is not tensor else complete
        return kept

    def random_states(self, device: torch.device) -> dict[str, Tensor]:
        """Those of all processes: the first's as a run of one process saves them, the others' under their rank."""
        states = random_states(device)
        if self.count == 1:
            return states
        own = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
        for name, state in zip(("cpu", "cuda"), own, strict=False):
            each = [torch.empty_like(state) for _ in range(self.count)]
            dist.all_gather(each, state)
            states |= {f"rank{rank}.{name}": each[rank] for rank in range(1, self.count)}
        return states

    def set_random_states(
        self, states: Mapping[str, Tensor] | None, seed: int, step: int, device: torch.device
    ) -> None:
        """Puts back what `random_states` gave. A process, or a GPU, that was not there gets a state of its own, from
        the seed."""
        rank = self._place.rank
        if self.first:
            if states is not None:
                restore_random_states(dict(states))
            return
        mixed = blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(mixed, "big") >> 1)
        own = {
            name: states[f"rank{rank}.{name}"] for name in ("cpu", "cuda") if states and f"rank{rank}.{name}" in states
        }
        if "cuda" in own:
            own[f"cuda.{device.index}"] = own.pop("cuda")
        if own:
            restore_random_states(own)


ALONE = Processes(Place())


def join(voice: OneVoice, config: Config) -> Processes:
    """Meets the other processes that torchrun has started, or none. Raises DeviceError where there are too few GPUs."""
    place = voice.place
    if place.processes == 1:
        return ALONE
    processes = Processes(place, voice.store())
    device = processes.device(config.run.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", voice.store()),
        rank=place.rank,
        world_size=place.processes,
        timeout=TIMEOUT,
    )
    if not processes.first:  # which meets the same, and says so
        warnings.simplefilter("ignore")
        logging.getLogger("torch").setLevel(logging.ERROR)
    return processes


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, in every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a whole tensor that belongs to `parameter`, where that is sharded."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


@contextmanager
def _kept_gathered(model: FSDPModule) -> Iterator[None]:
    """Weights that the forward pass has gathered stay: gradients that are added up take as much memory."""
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)


def _shard(model: Transformer, dtype: torch.dtype, ignored: set[nn.Parameter], by_block: bool) -> nn.Module:
    """FSDP2: of a process with one batch a step over blocks, each gathered while the one before it is computed.

    There the parameters of blocks are gathered in the dtype of the matrix products, and gradients summed in float32;
    the residual stream, the embeddings and the logits keep what autocast gives them, as in one process.

    With more batches the gradients that are added up are whole, and so are the weights from the first batch to the
    last: all in one group, in float32, for autocast as in one process.
    """
    # The losses are a view, of which nothing is overwritten.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.each_block() if by_block else []:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    # After a forward pass without a backward one the model's parameters would else not be its shards.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    return model


class AgreedStop(StopRequest):
    """What any of the processes was asked, known to all of them from the same call of `agree` on."""

    def __init__(self, own: StopRequest) -> None:
        super().__init__()
        self._own = own

    def agree(self) -> None:
        asked = torch.tensor(self._own.signal_number or 0)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.signal_number = int(asked) or None
        self.reason = self._own.reason


class Silence:
    """The display of the processes that do not speak."""

    interactive = False

    def start(self, plan: Any) -> None: ...

    def advance(self, step: int) -> None: ...

    def show(self, record: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self) -> None: ...
