"""What every test shares."""

import os

# The tensors of the tests are small: a second thread only waits for the first, and starves whatever else runs.
# Set before torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
