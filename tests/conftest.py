"""What every test shares."""

import os

# The tensors of the tests are small: a second thread only waits for the first, and starves whatever else runs.
# Set before torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU the kernels run in Triton's interpreter, which is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
