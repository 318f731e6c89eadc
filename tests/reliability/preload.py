"""Imports what the children of the experiments need."""

import tests.conftest  # noqa: I001 - one thread each, before torch is imported

import datasets  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401 - the optimizers do

import cda_cli.console  # noqa: F401
import tests.reliability.variants  # noqa: F401
