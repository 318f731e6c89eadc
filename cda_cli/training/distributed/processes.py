"""Runs one training in several processes, with PyTorch's DDP or FSDP2 (`fully_shard`).

Every process follows the data in its full order and makes its own rows of each step. The processes combine gradients,
losses and requests to stop. Only the first process (rank 0) prints and writes. The loop is the same for one process,
where nothing here has an effect.

With context parallelism, groups of neighbouring processes take the same rows, of which each computes a part.
"""

from __future__ import annotations

import inspect
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from hashlib import blake2b
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from cda_cli.config import Config, OptimConfig
from cda_cli.data import Share, share_of
from cda_cli.errors import DeviceError
from cda_cli.model import ContextPart, Transformer
from cda_cli.runtime import pick_device, random_states, restore_random_states
from cda_cli.signals import StopRequest
from cda_cli.training.distributed.launch import ERROR, NAME, POLL, ErrorCoordinator, Mesh, Place, log_level
from cda_cli.training.distributed.sharding import shard_model

# Nothing changes the model's buffers, so they need no broadcast. PyTorch 2.13 renamed the option.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_CONSTANT_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class Processes:
    """The processes of a run, seen from one of them. `join` makes it; ALONE stands for a run in one process.

    When it is left, the settings of PyTorch that it changed are restored.
    """

    def __init__(self, place: Place, store: Any = None, mesh: Mesh | None = None) -> None:
        self._place, self._store = place, store
        self.mesh = mesh or Mesh(place.processes, 1, shards=False)
        self.group = place.rank // self.mesh.parts  # the number of the group that has the same rows
        self._context: dist.ProcessGroup | None = None  # that group, if it has several processes
        self._on_host: dist.ProcessGroup | None = None  # the group for what the host waits for; None is the default one
        self._settings = ExitStack()
        self.count, self.rank = place.processes, place.rank
        self.first = place.rank == 0

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # After an error the other processes may wait in a collective that this one never joins. To destroy the group
        # would then wait for them; instead the launcher ends them once this process has ended.
        if self.count > 1 and error is None:
            dist.destroy_process_group()
        self._settings.close()

    def silence_warnings(self) -> None:
        """Shows no warnings, and of PyTorch's log only errors, until these processes are left."""
        self._settings.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        self._settings.enter_context(log_level("torch", logging.ERROR))

    # Texts in the store.

    def store_set(self, key: str, text: str = "") -> None:
        if self.count > 1:
            self._store.set(key, text)

    def store_wait(self, key: str) -> str:
        """Waits for the text under `key`, however long it takes. Unlike a collective it can be interrupted."""
        while not self._store.check([key]):
            if self._store.check([ERROR]):
                sys.exit(int(self._store.get(ERROR)))  # another process has shown the error
            time.sleep(POLL)
        return cast(bytes, self._store.get(key)).decode()

    def broadcast_text(self, key: str, find: Callable[[], str]) -> str:
        """Calls `find` in the first process, and returns its text in all."""
        if not self.first:
            return self.store_wait(key)
        text = find()
        self.store_set(key, text)
        return text

    def once_on_machine(self, key: str, find: Callable[[], str]) -> str:
        """Returns what `find` returns; where the first process of this machine has called it already, from there."""
        key = f"found/{self._place.machine}/{key}"
        if self.count > 1 and self._place.local_rank and self._store.check([key]):
            return cast(bytes, self._store.get(key)).decode()
        text = find()
        self.store_set(key, text)
        return text

    @contextmanager
    def first_process_first(self) -> Iterator[None]:
        """Lets in the first process, then the first of each other machine, then all, so that caches are filled once."""
        place = self._place
        if place.local_rank:
            self.store_wait(f"done/{place.machine}")
        elif place.rank:
            self.store_wait("done")
        yield
        if place.rank == 0:
            self.store_set("done")
        if place.local_rank == 0:
            self.store_set(f"done/{place.machine}")

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1), group=self._on_host)

    def broadcast(self, value: Any) -> Any:
        """Returns the first process's `value` in all. It waits for the first process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._on_host)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, in all of them. It waits for all."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, self._on_host)
        return values

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Returns this process's one of the `values` that the first gives, one for each. It waits for the first."""
        if self.count == 1:
            return values[0] if values else None
        own = [None]
        dist.scatter_object_list(own, list(values) if values else None, group=self._on_host)
        return own[0]

    # The work of a step.

    def share(self, optim: OptimConfig) -> Share:
        """Returns which rows of each step this process makes and trains on: those of its group."""
        return share_of(self.group, self.mesh.groups, optim.batch_size, optim.grad_accum)

    def accumulating(self, model: nn.Module, number: int, batches: int) -> AbstractContextManager[object]:
        """Surrounds forward and backward of batch `number` of a step's `batches`, counted from 1.

        Each adds to this process's gradients; the last also takes their mean over all processes.
        """
        last = number == batches
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
            return nullcontext() if batches == 1 else _keep_unsharded(model)
        if isinstance(model, DistributedDataParallel) and not last:
            return cast(AbstractContextManager[object], model.no_sync())
        return nullcontext()

    def gather_ahead(self, model: nn.Module) -> None:
        """Lets fsdp gather the new weights while the host goes on.

        Call it once the optimizer's kernels are launched. The next forward pass, of training or not, waits for the
        weights; nothing may write to them before it.
        """
        if isinstance(model, FSDPModule):
            model.unshard(async_op=True)

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum of the processes' values, with the same bits in all, and overwrites `value` with it."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def any(self, here: bool) -> bool:
        """Whether `here` is true in any process."""
        anywhere = torch.tensor(int(here))
        if self.count > 1:
            dist.all_reduce(anywhere, group=self._on_host)
        return bool(anywhere)

    def broadcast_value(self, value: float) -> float:
        """Returns the first process's `value` in all, so that all decide alike."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, 0, self._on_host)
        return shared.item()

    def agreed(self, stop: StopRequest) -> StopRequest:
        """Returns a request to stop that is the same in all processes (see `AgreedStop`)."""
        return AgreedStop(stop, self._on_host) if self.count > 1 else stop

    def meet(self, device: torch.device, minutes: float) -> None:
        """Meets the other processes. From then on, each waits for another one for so many minutes at most."""
        self.store_set(f"{NAME}/{self.rank}", f"process {self.rank} (pid {os.getpid()} on {socket.gethostname()})")
        limit, on_gpu = timedelta(minutes=minutes), device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.count,
            # NCCL kills a process that has waited for so long. By then gloo must have said whom it waits for.
            timeout=2 * limit if on_gpu else limit,
        )
        if on_gpu:
            self._on_host = dist.new_group(backend="gloo", timeout=limit)
        if self.mesh.parts > 1:
            backend, waits = ("nccl", 2 * limit) if on_gpu else ("gloo", limit)
            self._context, _ = dist.new_subgroups(self.mesh.parts, timeout=waits, backend=backend)

    # The model and its random states.

    def device(self, name: str) -> torch.device:
        """Returns the device of this process: of several, each takes the GPU of its number on this machine."""
        device = pick_device(name)
        if self.count == 1 or device.type == "cpu":
            return device
        if self._place.local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"{self._place.local_processes} processes want a GPU each and this machine has "
                f"{torch.cuda.device_count()}; start as many, or give --device cpu"
            )
        return torch.device("cuda", self._place.local_rank)

    def wrap(
        self, model: Transformer, config: Config, device: torch.device, dtype: torch.dtype, compiled: bool
    ) -> nn.Module:
        """Returns the module to call on `device` in place of `model`.

        It may replace parameters of `model` by sharded ones, so optimizers must be built afterwards. A model that is to
        be sharded may be on the device meta; it then gets memory here, but no values.

        The model is compiled as one. With ddp the gradients then travel after the last backward pass of a step and not
        during it, which costs less than many small compiled parts cost the host. Only where fsdp gathers and frees the
        weights block by block is the model compiled block by block.
        """
        if self.count == 1:
            return cast(nn.Module, torch.compile(model)) if compiled else model
        # DDP would wait for the gradient of an empty parameter (no null keys), which never comes.
        empty = {parameter for parameter in model.parameters() if not parameter.numel()}
        for parameter in empty:
            parameter.requires_grad_(False)
        if self._context is not None:
            model.split_context(ContextPart(self._context, device))
        if self.mesh.shards:
            by_block = self.share(config.optim).batches == 1
            if compiled and by_block:
                model.compile_parts()
            elif compiled:
                model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
            # The losses are a view, which nothing overwrites.
            self._settings.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            return shard_model(model, device, dtype, empty, by_block)
        called: nn.Module = model
        if compiled:
            # Otherwise Dynamo would cut the graph at DDP's buckets. It reads the setting whenever it compiles.
            self._settings.enter_context(torch._dynamo.config.patch(optimize_ddp=False))
            called = cast(nn.Module, torch.compile(model))
        # Without `find_unused_parameters` DDP orders its buckets anew after the first step. More than two processes add
        # a gradient in an order that depends on its place there, so that a resumed run would end with other bits. Two
        # do not, and DDP need not search the graph of each step.
        return DistributedDataParallel(
            called, gradient_as_bucket_view=True, find_unused_parameters=self.count > 2, **_CONSTANT_BUFFERS
        )

    def random_states(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the random states of all processes.

        Those of the first have the names that a run in one process gives them; the others' names have the rank.
        """
        states = random_states(device)
        if self.count == 1:
            return states
        own = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
        for name, state in zip(("cpu", "cuda"), own, strict=False):
            each = [torch.empty_like(state) for _ in range(self.count)]
            dist.all_gather(each, state, self._on_host)
            states |= {f"rank{rank}.{name}": each[rank] for rank in range(1, self.count)}
        return states

    def set_random_states(
        self, states: Mapping[str, Tensor] | None, seed: int, step: int, device: torch.device
    ) -> None:
        """Restores what `random_states` returned.

        A process, or a GPU, that has no state there gets one of its own, from the seed.
        """
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


def join(coordinator: ErrorCoordinator, config: Config) -> Processes:
    """Joins the other processes that torchrun has started, if any. Raises DeviceError if there are too few GPUs."""
    place = coordinator.place
    if place.processes == 1:
        return ALONE
    processes = Processes(place, coordinator.store(), Mesh.of(config.run, place.processes))
    device = processes.device(config.run.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    processes.meet(device, config.run.process_timeout)
    if not processes.first:
        processes.silence_warnings()  # the first process meets the same ones, and shows them
    return processes


@contextmanager
def _keep_unsharded(model: FSDPModule) -> Iterator[None]:
    """Keeps the weights that the forward pass has gathered. Accumulated gradients take as much memory anyway."""
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)


class AgreedStop(StopRequest):
    """A request to stop that any process got, known to all of them from the same call of `agree` on."""

    def __init__(self, own: StopRequest, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self._own, self._group = own, group

    def agree(self) -> None:
        asked = torch.tensor(self._own.signal_number or 0)
        dist.all_reduce(asked, dist.ReduceOp.MAX, self._group)
        self.signal_number = int(asked) or None
        self.reason = self._own.reason
