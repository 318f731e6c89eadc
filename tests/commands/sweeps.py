"""A small sweep, for the tests of `cda sweep`."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

FILE = """\
optim: {steps: 40}
arms:
  plain: {model: {attention: softmax}}
  sparse:
seeds: [0, 1, 2]
"""
