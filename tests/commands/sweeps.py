"""A small sweep, for the tests of `cda sweep`."""

from __future__ import annotations

from pathlib import Path

from cda_cli.sweep.attempts import Attempt

ROOT = Path(__file__).parent.parent.parent

FILE = """\
optim: {steps: 40}
arms:
  plain: {model: {attention: softmax}}
  sparse:
seeds: [0, 1, 2]
"""


def attempt(job: str, error: str = "") -> Attempt:
    return Attempt(
        job=job, command="cda train", began="2020-02-02T02:02:02+00:00", seconds=1800.0, exit_code=int(bool(error)),
        error=error, machine="a computer", device="cpu", version="1", commit="abc",
    )  # fmt: skip
