"""The weights of another run, from which a new run starts (`run.init_from`): what carries over, and what does not."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.config import Config, DataConfig, ModelConfig, OptimConfig
from cda_cli.data import Tokenizer, bpe_size, load_tokenizer, tokenizer_from_json
from cda_cli.errors import ConfigError
from cda_cli.model import expected_tensors, state_tensors
from cda_cli.plurals import counted
from cda_cli.restore import Restored, restore
from cda_cli.runs.records import InitRecord
from cda_cli.settings_table import as_written
from cda_cli.storage import AVERAGE, WEIGHTS, Checkpoint, load, recorded_sha256

POSITIONS = "position_embedding.weight"


class Carried(NamedTuple):
    """`tensors` fit the new model, which has `new` ones besides. It has no place for those that are `dropped`."""

    tensors: dict[str, Tensor]
    new: list[str]
    dropped: list[str]


class InitialWeights(NamedTuple):
    """The weights that a run starts from, with the tokenizer and the vocabulary that they know.

    `config` has the settings that they were trained with. `record` says which weights they are. Of a fork, `source` is
    their checkpoint, with the optimizer and the random states but without the weights, and `average` is the moving
    average of the weights, if the checkpoint has one.
    """

    carried: Carried
    config: Config
    tokenizer: Tokenizer
    record: InitRecord
    source: Checkpoint | None
    average: Mapping[str, Tensor] | None

    def remarks(self, config: Config) -> list[str]:
        """Returns sentences on what the run with these settings starts from, and on what did not carry over."""
        record = self.record
        which = "the moving average of the weights" if record.file == AVERAGE else "the weights"
        remarks = [f"starting from {which} of {record.path}, step {record.from_step}"]
        if self.source:
            remarks = [
                f"going on from {record.path}, step {record.from_step}, as a fork with its optimizer and its data"
            ]
        if changes := _changes(self.config.model, config.model):
            remarks.append(f"settings of the model that differ from theirs: {changes}")
        # A fork goes on with the optimizer, but its settings are those of the preset and the flags.
        if self.source and (changes := _changes(self.config.optim, config.optim)):
            remarks.append(f"settings of the optimizer that differ from theirs: {changes}")
        if self.carried.new:
            remarks.append(f"new parameters, as the model initialises them: {by_layers(self.carried.new)}")
        if self.carried.dropped:
            remarks.append(f"parameters that this model has no place for: {by_layers(self.carried.dropped)}")
        return remarks


def _changes(before: ModelConfig | OptimConfig, now: ModelConfig | OptimConfig) -> str:
    old = before.model_dump()
    return ", ".join(
        f"{name} {as_written(old[name])} → {as_written(value)}"
        for name, value in now.model_dump().items()
        if value != old[name]
    )


def read_initial_weights(path: Path, config: Config) -> InitialWeights:
    """Reads those weights of the checkpoint `path` that the model of `config` takes over.

    Raises CheckpointError if it is damaged, and ConfigError if the model has another shape or another tokenizer.
    """
    digests, fork = recorded_sha256(path), config.run.fork
    file = AVERAGE if config.run.init_ema and AVERAGE in digests and not fork else WEIGHTS
    restored = restore(path, torch.device("cpu"), ema=file == AVERAGE)
    carried = _carried(restored, config.model)
    tokenizer = _own_tokenizer(config.data, restored)
    step = restored.state["step"]
    begun = step if fork else 0
    record = InitRecord(step=begun, path=str(path), from_step=step, file=file, sha256=digests[file])
    source = load(path, parts=("optimizer", "rng")) if fork else None
    averaged = fork and config.optim.ema_decay and AVERAGE in digests
    average = _carried(restore(path, torch.device("cpu"), ema=True), config.model).tensors if averaged else None
    return InitialWeights(carried, restored.config, tokenizer, record, source, average)


def _carried(restored: Restored, now: ModelConfig) -> Carried:
    # A head that was tied to the embedding may go on by itself.
    tensors = state_tensors(restored.model) if now.tied_embeddings else restored.model.state_dict()
    return carry_over(tensors, restored.config.model, now)


def carry_over(tensors: Mapping[str, Tensor], before: ModelConfig, now: ModelConfig) -> Carried:
    """Sorts the tensors of the model `before` by what the model `now` does with them.

    A tensor carries over if its shape stays. Of learned positions, a shorter context takes the first. Raises
    ConfigError for any other shape, and for heads that cut the same shapes differently.
    """
    if before.heads != now.heads and before.heads * before.head_width == now.heads * now.head_width:
        raise ConfigError(
            f"the weights have heads × widths {before.heads} × {before.head_width}, and the settings {now.heads} × "
            f"{now.head_width}; leave model.heads and model.dim_head as they are in the run that they come from"
        )
    expected = {name: shape for name, (shape, _) in expected_tensors(now).items()}
    carried, new = {}, []
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is not None and name == POSITIONS and tensor.shape[0] > shape[0]:
            tensor = tensor[: shape[0]]
        if tensor is not None and tensor.shape == shape:
            carried[name] = tensor
        elif tensor is None or not tensor.numel():
            new.append(name)
        elif all(shape):
            raise _misfit(name, tensor.shape, shape)
    # A model without null keys and values has an empty tensor for them.
    dropped = [name for name, tensor in tensors.items() if name not in carried and tensor.numel()]
    return Carried(carried, new, dropped)


def by_layers(names: Collection[str]) -> str:
    """Lists parameters, and names those of several blocks once: blocks.0–3.attention.to_gate.weight."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        blocks.setdefault(f"blocks.{{}}.{found[2]}" if found else name, []).extend([found[1]] if found else [])
    spans = {place: "–".join(dict.fromkeys([*numbers[:1], *numbers[-1:]])) for place, numbers in blocks.items()}
    return ", ".join(place.format(span) for place, span in spans.items())


def _misfit(name: str, there: tuple[int, ...], here: tuple[int, ...]) -> ConfigError:
    remedy = "leave the sizes of the model as they are in the run that they come from"
    if name == POSITIONS:
        remedy = f"give --seq-len {there[0]} or less, as only rotary positions serve a longer context"
    return ConfigError(
        f"the weights do not fit the settings: {name} has shape {tuple(there)} in them and {tuple(here)} in the model; "
        f"{remedy}"
    )


def _own_tokenizer(data: DataConfig, restored: Restored) -> Tokenizer:
    """Returns the tokenizer of the weights, with the tokens that `data` has begin and end a document.

    Raises ConfigError if `data` names another, or a token that the weights do not know.
    """
    asked, known = data.tokenizer, restored.config.data.tokenizer
    tokenizer = tokenizer_from_json(restored.tokenizer.to_json(), known, data.bos, data.eos)
    if asked != known and (
        bpe_size(asked) is not None or load_tokenizer(asked, data.bos, data.eos).fingerprint != tokenizer.fingerprint
    ):
        raise ConfigError(
            f"the weights know the tokens of their own tokenizer, {known}, and of no other; leave --tokenizer "
            f"{asked} out"
        )
    if tokenizer.vocab_size > restored.config.model.vocab_size:
        raise ConfigError(
            f"the weights know {counted(restored.config.model.vocab_size, 'token')}, and with data.eos "
            f"{as_written(data.eos)} the tokenizer has {tokenizer.vocab_size:,}; leave data.eos as it is in the run "
            "that they come from"
        )
    return tokenizer
