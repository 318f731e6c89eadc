"""Imports what the children of the experiments need."""

import gc
import os

# The imports ask CUDA whether it is there, and a child that is forked after that cannot use it. The children work on
# the CPU, so neither this process nor a child sees a GPU. What trains on a GPU starts in a new interpreter.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tests.conftest  # noqa: I001 - one thread each, before torch is imported

import datasets  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401 - the optimizers do

import cda_cli.console  # noqa: F401
import tests.commands.helpers  # the commands too
import tests.reliability.variants  # noqa: F401

# No child looks for garbage among the objects of the imports, which would also copy their memory.
gc.collect()
gc.freeze()
