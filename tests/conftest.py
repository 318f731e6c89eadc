"""What every test shares."""

import os

# The tensors of the tests are small: a second thread only waits for the first, and starves whatever else runs.
# Set before torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As `run.deterministic` sets it. Here other tests use cuBLAS first, which then reads it for the whole process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

# Without a GPU the kernels run in Triton's interpreter, which is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
