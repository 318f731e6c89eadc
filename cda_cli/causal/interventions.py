"""Interventions: what is changed in a trained model, without training, to measure what the changed part does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from cda_cli.model import Transformer, editing


class Intervention(ABC):
    """One change. It is used for one evaluation, of which it may count something itself."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it changes, by the name of the list in JSON."""

    @property
    @abstractmethod
    def name(self) -> str:
        """How a figure is called for, such as "top[32]" in `top[32].difference`."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What is changed, in a few words, for a table."""

    def require(self, model: Transformer) -> None:
        """Raises ConfigError, before anything is computed, if the change has no meaning for `model`."""
        return

    @abstractmethod
    def applied(self, model: Transformer) -> AbstractContextManager[nn.Module]:
        """Applies the change within a `with` statement, which gets the model to run: `model`, or another one."""

    def columns(self) -> dict[str, str]:
        """What a table shows of it, besides its effect, by the heads of the columns."""
        return {}

    def fields(self) -> dict[str, Any]:
        """What it counted, or what defines it, by the names in JSON."""
        return {}


@contextmanager
def edited(model: Transformer, **edits: Any) -> Iterator[nn.Module]:
    """`model` under the edits that `editing` takes."""
    with editing(model, **edits):
        yield model


def doubled(first: int, last: int) -> list[int]:
    """Returns `first`, twice that, and so on, and at the end `last`, which is no smaller: 1, 2, 4, 6."""
    numbers = []
    while first < last:
        numbers.append(first)
        first *= 2
    return [*numbers, last]
