"""Deliberately broken versions of the product. Each experiment must fail with those that it names.

An experiment that passes whatever the product does shows nothing; these are the proof that it can fail.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cda_cli.config
import cda_cli.data.batches
import cda_cli.data.sources
import cda_cli.data.streaming
import cda_cli.runs.folder
import cda_cli.storage.atomic
import cda_cli.storage.checkpoint
import cda_cli.storage.manifest
import cda_cli.strict_yaml
import cda_cli.training.distributed.processes
import cda_cli.training.loop
import cda_cli.training.nonfinite
import cda_cli.training.optimizer
import cda_cli.training.run
import cda_cli.training.setup
from cda_cli.data import digest
from cda_cli.errors import StorageError
from tests.racing import race_in_first_calls
from tests.reliability import broken_processes, broken_stopping

Patch = pytest.MonkeyPatch
VARIANTS: dict[str, Callable[[Patch], None]] = {}

atomic, checkpoint, manifest = cda_cli.storage.atomic, cda_cli.storage.checkpoint, cda_cli.storage.manifest
batches, streaming = cda_cli.data.batches, cda_cli.data.streaming


@contextlib.contextmanager
def broken(name: str) -> Iterator[None]:
    """Within it, the product is the variant of that name; "" is the product as it is."""
    with pytest.MonkeyPatch.context() as patch:
        if name:
            VARIANTS[name](patch)
        yield


def variant(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    VARIANTS[function.__name__.replace("_", " ").replace("yaml", "YAML").replace("hang up", "hang-up")] = function
    return function


# Saving


@variant
def saved_in_place(patch: Patch) -> None:
    @contextlib.contextmanager
    def published_folder(path: Path) -> Iterator[Path]:
        path.mkdir(parents=True)
        yield path

    patch.setattr(checkpoint, "published_folder", published_folder)


@variant
def pruned_in_place(patch: Patch) -> None:
    patch.setattr(checkpoint, "remove_published", shutil.rmtree)


@variant
def never_synced(patch: Patch) -> None:
    patch.setattr(atomic, "_fsync", lambda path: None)


@variant
def synced_after_the_rename(patch: Patch) -> None:
    settle = atomic._settle

    @contextlib.contextmanager
    def published_folder(path: Path) -> Iterator[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = atomic._hidden_sibling(path)
        hidden.mkdir()
        yield hidden
        hidden.rename(path)
        settle(path)
        atomic._fsync(path.parent)

    patch.setattr(checkpoint, "published_folder", published_folder)


@variant
def removed_before_the_new_one_is_there(patch: Patch) -> None:
    published_folder = checkpoint.published_folder

    @contextlib.contextmanager
    def after_making_room(path: Path) -> Iterator[Path]:
        for old in path.parent.glob("step-*"):
            checkpoint.remove_published(old)
        with published_folder(path) as folder:
            yield folder

    patch.setattr(checkpoint, "published_folder", after_making_room)


@variant
def best_pruned_as_the_others(patch: Patch) -> None:
    prune = checkpoint._prune
    patch.setattr(checkpoint, "_prune", lambda run, **rest: prune(run, **rest | {"keep_best": False}))


@variant
def best_moved_aside_while_pruning(patch: Patch) -> None:
    """Hides the best checkpoint until the pruning is over."""
    prune = checkpoint._prune

    def with_best_aside(run: Path, **rest: Any) -> None:
        found = checkpoint.best(run)
        assert found
        aside = found.rename(found.with_name(f"aside-{found.name}"))
        prune(run, **rest)
        aside.rename(found)

    patch.setattr(checkpoint, "_prune", with_best_aside)


# Damage


@variant
def manifest_not_checked(patch: Patch) -> None:
    patch.setattr(checkpoint, "verify", lambda path, hashed=(): frozenset(entry.name for entry in Path(path).iterdir()))


@variant
def only_sizes_checked(patch: Patch) -> None:
    check = manifest._check_content
    # The header of a file is still looked at, but any content has the right digest.
    patch.setattr(manifest, "_check_content", lambda file, found, sha256: check(file, sha256, sha256))


@variant
def manifest_in_any_spelling(patch: Patch) -> None:
    canonical = manifest._canonical

    class Anything(bytes):
        __hash__ = None  # type: ignore[assignment]

        def __ne__(self, other: object) -> bool:
            return False

    patch.setattr(manifest, "_canonical", lambda content: Anything(canonical(content)))


# Resuming


@variant
def random_states_not_restored(patch: Patch) -> None:
    patch.setattr(cda_cli.training.distributed.processes, "restore_random_states", lambda states: None)


@variant
def moments_not_restored(patch: Patch) -> None:
    unpack = cda_cli.training.setup.unpack_optimizer
    patch.setattr(
        cda_cli.training.setup, "unpack_optimizer", lambda tensors, plain: unpack(tensors, plain) | {"state": {}}
    )


@variant
def position_not_restored(patch: Patch) -> None:
    for name in ("TrainBatches", "StreamedBatches"):
        original = getattr(cda_cli.training.setup, name)
        begun = lambda *given, original=original, **named: original(*given[:4], **named)  # noqa: E731
        patch.setattr(cda_cli.training.setup, name, begun)


@variant
def vector_functions_not_settled(patch: Patch) -> None:
    """Lets the first calls of this process race, which the product has made before."""
    race_in_first_calls(patch)


@variant
def order_from_hidden_random_state(patch: Patch) -> None:
    plan = batches.TrainBatches._plan_epoch

    def unseeded(self: Any) -> Any:
        shift, order = plan(self)
        return shift, torch.randperm(len(order)).numpy()

    patch.setattr(batches.TrainBatches, "_plan_epoch", unseeded)


@variant
def order_of_the_first_epoch_only(patch: Patch) -> None:
    """Gives a resumed pass the order of pass 0, which is right until the first pass is over."""
    plan = batches.TrainBatches._plan_epoch

    def resumed_plan(self: Any) -> Any:
        # The first plan of an object is that of the pass in which it resumes.
        epoch, self._epoch = self._epoch, self._epoch if hasattr(self, "_order") else 0
        try:
            return plan(self)
        finally:
            self._epoch = epoch

    patch.setattr(batches.TrainBatches, "_plan_epoch", resumed_plan)


@variant
def position_of_what_was_fetched_ahead(patch: Patch) -> None:
    state = batches.TrainBatches.state
    patch.setattr(
        batches.TrainBatches,
        "state",
        lambda self: state(self) | {"position": min(len(self._order), self._position + self._batch_size)},
    )


@variant
def offset_in_the_document_lost(patch: Patch) -> None:
    state = streaming.StreamedBatches.state
    patch.setattr(streaming.StreamedBatches, "state", lambda self: state(self) | {"offset": 0})


@variant
def epoch_of_the_stream_lost(patch: Patch) -> None:
    """Starts the second pass where the first was resumed."""
    blocks = streaming.StreamedBatches._blocks

    def stuck(self: Any, place: Any, characters: int) -> Iterator[Any]:
        while True:
            for block in blocks(self, place, characters):
                yield block
                if block.whole_pass is not None:
                    break

    patch.setattr(streaming.StreamedBatches, "_blocks", stuck)


# Another text


@variant
def another_text_let_through(patch: Patch) -> None:
    patch.setattr(cda_cli.training.run, "check_same_text", lambda *_: None)
    patch.setattr(streaming, "check_state", lambda *_: None)


@variant
def text_known_by_its_length(patch: Patch) -> None:
    length_only = lambda paths, sizes: digest(list(sizes))  # noqa: E731
    patch.setattr(cda_cli.data.sources, "content_digest", length_only)


# Stopping


for one in broken_stopping.ALL:
    variant(one)


# What is not finite


@variant
def what_is_not_finite_let_through(patch: Patch) -> None:
    patch.setattr(cda_cli.training.nonfinite.StepValues, "is_finite", True)


@variant
def only_the_loss_looked_at(patch: Patch) -> None:
    result = cda_cli.training.nonfinite.StepResult
    patch.setattr(
        cda_cli.training.loop, "StepResult", lambda loss, norm, measured: result(loss, torch.zeros(()), measured)
    )


@variant
def step_taken_before_it_is_judged(patch: Patch) -> None:
    guarded = cda_cli.training.optimizer.GuardedOptimizer
    patch.setattr(guarded, "launch", lambda self, result: self._end_step(take=True))
    patch.setattr(guarded, "settle", lambda self, finite: None)


@variant
def average_taken_of_a_refused_step_too(patch: Patch) -> None:
    """Updates the average with every step, when its gradients are dropped."""
    build = cda_cli.training.run.build

    def built(*given: Any) -> Any:
        context, state = build(*given)
        if state.average:
            drop, update = state.optimizer.zero_grad, state.average.update
            patch.setattr(state.optimizer, "zero_grad", lambda set_to_none: (drop(set_to_none), update(state.step + 1)))
            patch.setattr(state.average, "update", lambda step: None)
        return context, state

    patch.setattr(cda_cli.training.run, "build", built)


# One writer


@variant
def lock_left_out(patch: Patch) -> None:
    @contextlib.contextmanager
    def only_writer(folder: Path, warn: object) -> Iterator[None]:
        folder.mkdir(parents=True, exist_ok=True)
        yield

    patch.setattr(cda_cli.runs.folder, "only_writer", only_writer)


@variant
def lock_is_a_file_that_exists(patch: Patch) -> None:
    @contextlib.contextmanager
    def only_writer(folder: Path, warn: object) -> Iterator[None]:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(folder / ".lock", os.O_CREAT | os.O_EXCL))
        except FileExistsError as error:
            raise StorageError(f"{folder} is being written by another process ({folder / '.lock'}); wait") from error
        yield
        (folder / ".lock").unlink()

    patch.setattr(cda_cli.runs.folder, "only_writer", only_writer)


# Several processes


for one in broken_processes.ALL:
    variant(one)


# Hostile files


@variant
def tensors_unpickled(patch: Patch) -> None:
    def read(path: Path) -> Any:
        try:
            return original(path)
        except cda_cli.errors.CheckpointError:
            return pickle.loads(path.read_bytes())

    original = checkpoint.read_tensors
    patch.setattr(checkpoint, "read_tensors", read)
    patch.setattr(manifest, "MAX_HEADER_BYTES", 2**64)  # a pickle's first bytes, taken for a length, are beyond it


@variant
def yaml_with_tags(patch: Patch) -> None:
    patch.setattr(cda_cli.strict_yaml, "Loader", yaml.UnsafeLoader)


@variant
def links_followed(patch: Patch) -> None:
    patch.setattr(manifest, "_regular_size", lambda file: file.stat().st_size)


@variant
def any_name_in_a_manifest(patch: Patch) -> None:
    class Everything(frozenset[str]):
        def __contains__(self, name: object) -> bool:
            return True

        def __ror__(self, other: object) -> Everything:
            return self

    patch.setattr(manifest, "OPTIONAL", Everything())


@variant
def everything_else_pruned(patch: Patch) -> None:
    prune = checkpoint._prune

    def prune_all(run: Path, *, keep: int, keep_best: bool, published: Path) -> None:
        prune(run, keep=keep, keep_best=keep_best, published=published)
        for entry in published.parent.iterdir():
            if entry.is_dir() and entry not in {
                checkpoint.step_folder(run, step) for step in checkpoint.list_steps(run)
            }:
                shutil.rmtree(entry, ignore_errors=True)

    patch.setattr(checkpoint, "_prune", prune_all)
