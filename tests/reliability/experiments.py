"""Every promise of docs/reliability.md, the experiment that could break it, and the broken variants that must."""

from __future__ import annotations

import functools
import time

from tests.devices import DEVICES
from tests.reliability import (
    damage,
    data_position,
    hanging,
    hostile,
    layouts,
    non_finite,
    one_writer,
    other_text,
    resuming,
    saving,
    sharded,
    stopping,
)
from tests.reliability.harness import Experiment, Sum, results

SECONDS_BETWEEN_LINES = 10.0

EXPERIMENTS: dict[str, Experiment] = {
    "kills": Experiment(
        "A process that is killed while it saves, renames or prunes loses neither the newest published checkpoint nor "
        "the best",
        saving.kills,
        full=200,
        reduced=10,
        variants=("saved in place", "removed before the new one is there", "best pruned as the others"),
    ),
    "faults": Experiment(
        "The same for a kill, or an error of the disk, before and after every call that changes it",
        saving.faults,
        full=10_000,
        reduced=28,
        variants=(
            "saved in place",
            "pruned in place",
            "removed before the new one is there",
            "best pruned as the others",
            "best moved aside while pruning",
        ),
    ),
    "power": Experiment(
        "What is renamed is on the disk before, and what is removed is replaced before (computed from the order of "
        "the calls)",
        saving.power_losses,
        full=10_000,
        reduced=10_000,
        variants=("never synced", "synced after the rename", "saved in place", "best pruned as the others"),
    ),
    "full disks": Experiment(
        "A full disk, at any byte of any file, leaves the checkpoint before, nothing half, and one sentence",
        saving.full_disks,
        full=50,
        reduced=9,
        variants=("saved in place",),
    ),
    "damage": Experiment(
        "A damaged file of a checkpoint, the manifest too, is never taken for whole, and is said in one sentence",
        damage.damaged_files,
        full=10_000,
        reduced=300,
        variants=("manifest not checked", "only sizes checked", "manifest in any spelling"),
    ),
    "kills in shards": Experiment(
        "Where several processes save together, a kill of any of them loses neither the newest published checkpoint "
        "nor the best, and ends the others",
        sharded.kills,
        full=100,
        reduced=4,
        variants=("saved in place", "shards not waited for"),
    ),
    "damaged shards": Experiment(
        "A damaged shard is never taken for whole, and is said in one sentence",
        damage.damaged_shards,
        full=10_000,
        reduced=50,
        variants=("manifest not checked", "only sizes checked"),
    ),
    "hangs": Experiment(
        "Where one of several processes hangs, the others wait no longer than they may, and end with one sentence, "
        "which names it",
        hanging.hangs,
        full=20,
        reduced=2,
        variants=("those that wait not told apart",),
    ),
    "layouts": Experiment(
        "A run of 2 or 4 processes, in each layout, that is cut after any step and resumed in the same one is the run "
        "that was not cut, to the last bit",
        layouts.cuts,
        full=30,
        reduced=3,
        variants=("random states of the first alone", "shards of the first for all"),
    ),
    "cuts": Experiment(
        "60 steps that are cut after any of the first 59 and resumed in a fresh process are the run that was not cut, "
        "to the last bit",
        resuming.cuts,
        full=59,
        reduced=1,
        variants=(
            "random states not restored",
            "moments not restored",
            "position not restored",
            "order from hidden random state",
            "vector functions not settled",
        ),
    ),
    "chains": Experiment(
        "The same for chains of 3 to 5 resumes, each in a fresh process, of mapped and of streamed texts",
        resuming.chains,
        full=20,
        reduced=1,
        variants=("offset in the document lost",),
    ),
    "mapped": Experiment(
        "The position in a memory-mapped text resumes exactly after random cuts: no token lost, none doubled",
        data_position.mapped,
        full=200,
        reduced=70,
        variants=(
            "order from hidden random state",
            "order of the first epoch only",
            "position of what was fetched ahead",
        ),
    ),
    "streamed": Experiment(
        "The same for a streamed text, of 1, 3 and 7 files",
        data_position.streamed,
        full=200,
        reduced=14,
        variants=("offset in the document lost", "epoch of the stream lost"),
    ),
    "texts": Experiment(
        "A run goes on with the text that it was trained on, wherever that lies, and with no other of its length, even "
        "where a file is replaced with its time kept; it is refused, and nothing changes",
        other_text.texts,
        full=200,
        reduced=6,
        variants=("another text let through", "text known by its length"),
    ),
    "signals": Experiment(
        "SIGTERM, SIGINT and a hang-up (SIGHUP) at any moment, and a second one, end the run within 10 s with exit "
        "code 143, 130 or 129, lose no step, and the run goes on as if it had not been stopped",
        stopping.signals,
        full=105,
        reduced=5,
        variants=(
            "stop not asked for while evaluating",
            "only one signal heard",
            "hang-up not heard",
            "second signal kills",
            "stopped anywhere",
        ),
    ),
    "lost output": Experiment(
        "So does a stdout that can no longer be written (a closed pipe, a full disk, a terminal that has gone), once "
        "something is printed, with exit code 141",
        stopping.lost_output,
        full=100,
        reduced=3,
        variants=("lost output ends the run", "lost output not seen"),
    ),
    "not finite": Experiment(
        "A loss, gradient or activation that is not finite never reaches weights, moments, their average or a "
        "checkpoint, with AdamW or Muon; the step is named",
        non_finite.poisoned_steps,
        full=360,
        reduced=9,
        variants=(
            "what is not finite let through",
            "only the loss looked at",
            "step taken before it is judged",
            "average taken of a refused step too",
        ),
    ),
    "pairs": Experiment(
        "Of two processes started together in one folder exactly one runs, and a kill frees it",
        one_writer.pairs,
        full=50,
        reduced=4,
        variants=("lock left out", "lock is a file that exists"),
    ),
    "hostile files": Experiment(
        "Hostile files in a checkpoint, a configuration or a tokenizer run no code, and are said in one sentence",
        hostile.files,
        full=1_000,
        reduced=5,
        variants=("tensors unpickled", "YAML with tags"),
    ),
    "hostile names": Experiment(
        "Hostile names and links in a run: nothing outside it is read, written or removed",
        hostile.names,
        full=1_000,
        reduced=5,
        variants=("links followed", "any name in a manifest", "everything else pruned"),
    ),
}

if "cuda" in DEVICES:
    EXPERIMENTS |= {
        "cuts on a GPU": Experiment(
            "60 steps that are cut and resumed on a GPU, in bf16 with run.deterministic, are the run that was not cut",
            functools.partial(resuming.cuts, device=resuming.ON_GPU, at_once=8),
            full=59,
            reduced=1,
            variants=("moments not restored",),
        ),
        "chains on a GPU": Experiment(
            "The same for chains of 3 to 5 resumes",
            functools.partial(resuming.chains, device=resuming.ON_GPU, at_once=8),
            full=20,
            reduced=1,
            variants=("offset in the document lost",),
        ),
    }


def run_in_full(name: str, seed: int) -> tuple[str, Sum, float]:
    """Runs one experiment with its full count, and says now and then how far it is."""
    experiment, total, began = EXPERIMENTS[name], Sum(), time.monotonic()
    said = began
    for failure in results(experiment.trials, experiment.full, seed):
        total.add(failure)
        if failure is not None:
            print(f"{name}: FAILED: {failure}", flush=True)
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"{name}: {total.tried} of at most {experiment.full}, {total.failed} failed", flush=True)
    return name, total, time.monotonic() - began
