"""What the children of the experiments have imported already."""

import tests.conftest  # noqa: I001 - one thread each, before torch is imported

import datasets  # noqa: F401
import tokenizers  # noqa: F401

import tests.reliability.variants  # noqa: F401
