"""Deliberately broken ways to stop, for `variants`."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

import pytest

import cda_cli.signals
import cda_cli.training.run

Patch = pytest.MonkeyPatch
StopRequest = cda_cli.signals.StopRequest


def stop_not_asked_for_while_evaluating(patch: Patch) -> None:
    patch.setattr(StopRequest, "until", lambda self, items: iter(items))


def not_heard(number: signal.Signals, patch: Patch) -> None:
    enter = StopRequest.__enter__

    def without(self: Any) -> Any:
        enter(self)
        signal.signal(number, signal.SIG_DFL)
        return self

    patch.setattr(StopRequest, "__enter__", without)


def only_one_signal_heard(patch: Patch) -> None:
    not_heard(signal.SIGTERM, patch)


def hang_up_not_heard(patch: Patch) -> None:
    not_heard(signal.SIGHUP, patch)


def lost_output_ends_the_run(patch: Patch) -> None:
    patch.setattr(cda_cli.training.run, "when_stdout_is_lost", lambda answer: contextlib.nullcontext())


def lost_output_not_seen(patch: Patch) -> None:
    patch.setattr(StopRequest, "lose", lambda self, error: None)


def second_signal_kills(patch: Patch) -> None:
    receive = StopRequest._receive

    def once(self: Any, number: int, frame: Any) -> None:
        receive(self, number, frame)
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)

    patch.setattr(StopRequest, "_receive", once)


def stopped_anywhere(patch: Patch) -> None:
    def leave(self: Any, number: int, frame: Any) -> None:
        self.signal_number = self.signal_number or number
        raise KeyboardInterrupt

    patch.setattr(StopRequest, "_receive", leave)


ALL = (
    stop_not_asked_for_while_evaluating,
    only_one_signal_heard,
    hang_up_not_heard,
    lost_output_ends_the_run,
    lost_output_not_seen,
    second_signal_kills,
    stopped_anywhere,
)
