"""Zeros that the programs of a launch count up as they arrive, and that the last one sets back.

Launches that may run at the same time must not share them. Those of one stream run one after another. A CUDA graph may
run beside anything, so each launch that a graph holds has zeros of its own, for good.
"""

from __future__ import annotations

import threading

import torch
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
        stream, captured = 0, False
        if device.type == "cuda":
            stream, captured = torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
        found = None if captured else self._of_stream.get((device, stream))
        if found is not None and len(found) >= count:
            return found
        with self._lock:
            return self._taken(device, count) if captured else self._for_stream(device, stream, count)

    def _for_stream(self, device: torch.device, stream: int, count: int) -> Tensor:
        if len(self._left.get(device, ())) < count:
            self._left[device] = torch.zeros(max(RESERVED, count), dtype=torch.int32, device=device)
            self._kept.append(self._left[device])
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # Other streams will read them.
        found = self._of_stream[device, stream] = self._taken(device, count)
        return found

    def _taken(self, device: torch.device, count: int) -> Tensor:
        left = self._left.get(device)
        if left is None or len(left) < count:  # A graph can reserve nothing. It then sets them to zero in each run.
            return torch.zeros(count, dtype=torch.int32, device=device)
        self._left[device] = left[count:]
        return left[:count]


arrivals = Arrivals()
