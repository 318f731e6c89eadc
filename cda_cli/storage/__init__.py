"""Files that are whole or absent: atomic writes and checkpoints.

The package takes tensors and plain dicts, never a module. `atomic` writes any file, and `checkpoint` is the door to the
rest. Importing the package does not import torch, so a command can look into a run's folder first.
"""

from cda_cli.storage.atomic import (
    check_free,
    is_device_or_pipe,
    is_hidden,
    published_folder,
    remove_published,
    remove_stale,
    write_file,
)
from cda_cli.storage.checkpoint import (
    STATE_FILE,
    Checkpoint,
    best,
    check_fits,
    list_steps,
    load,
    locate,
    newest,
    open_checkpoint,
    pack_optimizer,
    publish,
    recorded_sha256,
    step_folder,
    unpack_optimizer,
    verify,
)
from cda_cli.storage.lock import LOCK, is_held, only_writer
from cda_cli.storage.manifest import AVERAGE, WEIGHTS, sha256_of
from cda_cli.storage.run_files import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, holds_run
from cda_cli.storage.shards import ALONE, Group, own_rows
from cda_cli.storage.tensors import StoredTensor, write_tensors

__all__ = [
    "ALONE",
    "AVERAGE",
    "CHECKPOINTS",
    "CONFIG_FILE",
    "LOCK",
    "METRICS_FILE",
    "STATE_FILE",
    "WEIGHTS",
    "Checkpoint",
    "Group",
    "StoredTensor",
    "best",
    "check_fits",
    "check_free",
    "holds_run",
    "is_device_or_pipe",
    "is_held",
    "is_hidden",
    "list_steps",
    "load",
    "locate",
    "newest",
    "only_writer",
    "open_checkpoint",
    "own_rows",
    "pack_optimizer",
    "publish",
    "published_folder",
    "recorded_sha256",
    "remove_published",
    "remove_stale",
    "sha256_of",
    "step_folder",
    "unpack_optimizer",
    "verify",
    "write_file",
    "write_tensors",
]
