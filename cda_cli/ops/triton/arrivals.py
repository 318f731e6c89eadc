"""Zeros that the programs of a launch count up as they arrive, and that the last one sets back.

Launches that may run at the same time must not share them. Those of one stream run one after another. A CUDA graph may
run beside anything, so each launch that a graph holds has zeros of its own, for good.
"""

from __future__ import annotations

import threading

import torch
import triton
from torch import Tensor

RESERVED = 2**20  # numbers of 4 bytes that are reserved at a time


class Arrivals:
    """Deals out zeros, int32."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[torch.device, Tensor] = {}
        self._of_stream: dict[tuple[torch.device, int], Tensor] = {}
        self._kept: list[Tensor] = []  # A graph holds the address alone.

    def zeros(self, device: torch.device, count: int) -> Tensor:
        """At least `count` zeros for a launch on the current stream of `device`, the current device."""
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                with self._lock:
                    return self._of_graph(device, count)
            stream = triton.runtime.driver.active.get_current_stream(device.index)
        found = self._of_stream.get((device, stream))
        # A graph can reserve nothing, so there must be enough before it is captured.
        if found is not None and found.numel() >= count and 2 * self._left[device].numel() >= RESERVED:
            return found
        with self._lock:
            if len(self._left.get(device, ())) < RESERVED // 2 + count:
                self._reserve(device, RESERVED + count)
            found = self._of_stream[device, stream] = self._taken(device, count)
            return found

    def _reserve(self, device: torch.device, count: int) -> None:
        self._left[device] = torch.zeros(count, dtype=torch.int32, device=device)
        self._kept.append(self._left[device])
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # Other streams will read them.

    def _of_graph(self, device: torch.device, count: int) -> Tensor:
        if len(self._left.get(device, ())) >= count:
            return self._taken(device, count)
        return torch.zeros(count, dtype=torch.int32, device=device)  # Each run of the graph sets them to zero.

    def _taken(self, device: torch.device, count: int) -> Tensor:
        taken, self._left[device] = self._left[device][:count], self._left[device][count:]
        return taken


arrivals = Arrivals()
