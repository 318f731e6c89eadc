"""What each layer and head of a model selects, over real text.

windows of the text → observed forward passes → sums of measures (`watchers`) → a report
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from cda_cli.data import Batch
from cda_cli.errors import ConfigError
from cda_cli.inspection.watchers import Watcher
from cda_cli.model import Transformer
from cda_cli.runtime import autocast, to_device


@torch.no_grad()
def inspect(
    model: Transformer,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    watcher: Watcher,
    advance: Callable[[int], None] = lambda windows: None,
) -> None:
    """Has `watcher` see `model` over `batches`, in evaluation mode, and restores the mode of the model.

    `dtype` is that of the matrix products. `advance` gets the number of windows of each batch once it is done.
    """
    training = model.training
    model.eval()
    try:
        with watcher.watching(model):
            for batch in batches:
                inputs = to_device(batch.inputs, device)
                with autocast(device, dtype):  # Nobody reads the logits, which would take T × V numbers.
                    model(inputs, wanted_B=inputs.new_zeros(len(inputs)))
                advance(len(batch.inputs))
    finally:
        model.train(training)


def parse_selection(text: str | None, count: int, option: str) -> list[int]:
    """Reads numbers and ranges below `count`: `0,2-3` gives [0, 2, 3], and None gives all of them.

    `option` names what was given, for the ConfigError that is raised for anything else.
    """
    if text is None:
        return list(range(count))
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            lowest, highest = int(first), int(last if dash else first)
        except ValueError as error:
            raise ConfigError(f"{option} takes numbers and ranges such as 0,2-3, not {text!r}") from error
        if not 0 <= lowest <= highest < count:
            raise ConfigError(f"{option} {text} is out of range; this model has 0 to {count - 1}")
        chosen += range(lowest, highest + 1)
    return chosen
