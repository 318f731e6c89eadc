"""The tensors of other tools and ours: each of ours is made of the rows of some of theirs, in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.model import expected_tensors

Read = Callable[[], Tensor]
NOTHING = "(?!)"  # an expression that matches no name
HEAD = "lm_head.weight"  # it may stand in a file although it is the token embedding


class Rows(NamedTuple):
    """Their tensors whose rows, one after another, make one of ours. {} stands for the number of the block.

    `transposed` ones are [in, out], as the Conv1D of GPT-2 has them.
    """

    names: tuple[str, ...]
    transposed: bool = False

    def of_block(self, block: str) -> Rows:
        return self._replace(names=tuple(name.replace("{}", block) for name in self.names))


def table_of(tensors: Mapping[str, Rows], shapes: Mapping[str, Sequence[int]]) -> dict[str, Rows]:
    """Maps each of our tensors, whose `shapes` are given, to those of the family that make it.

    An empty tensor may have none. Raises ConfigError for any other tensor that the family lacks.
    """
    table = {}
    for name, shape in shapes.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        block, general = (found[1], f"blocks.{{}}.{found[2]}") if found else ("", name)
        if general not in tensors:
            if 0 in shape:
                continue
            raise ConfigError(f"no tensor of such a model makes {name}; leave out the setting that asks for it")
        table[name] = tensors[general].of_block(block)
    return table


def to_ours(
    tensors: Mapping[str, Rows], model: ModelConfig, readers: Mapping[str, Read], derived: str = NOTHING
) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the values, float32, of each tensor of `model`, read one after another.

    `readers` reads each tensor of the source by its name. Raises CheckpointError, before anything is read, for a
    tensor that is missing, and for one that nothing is made of unless its whole name matches `derived`.
    """
    shapes = {name: shape for name, (shape, _) in expected_tensors(model).items()}
    table = table_of(tensors, shapes)
    used = [name for rows in table.values() for name in rows.names]
    for name in used:
        if name not in readers:
            raise CheckpointError(
                f"the model has no tensor {name}, which its configuration asks for; download it again"
            )
    tied = HEAD if model.tied_embeddings and HEAD in readers else None
    for name in readers:
        if name not in used and name != tied and not re.fullmatch(derived, name):
            raise CheckpointError(
                f"the model has a tensor {name}, which cda has no use for; give a causal language model of a known "
                "architecture, without adapters"
            )
    for name, rows in table.items():
        yield name, _joined(name, rows, shapes[name], readers)
    yield from ((name, torch.empty(shape)) for name, shape in shapes.items() if name not in table)
    if tied and not torch.equal(readers[tied](), readers[table["token_embedding.weight"].names[0]]()):
        raise CheckpointError(
            f"{tied} differs from the token embedding, and the configuration says that both are one; set "
            "tie_word_embeddings in config.json to false"
        )


def _joined(name: str, rows: Rows, shape: tuple[int, ...], readers: Mapping[str, Read]) -> Tensor:
    parts = [readers[source]() for source in rows.names]
    if not all(part.is_floating_point() for part in parts):
        raise CheckpointError(
            f"{rows.names[0]} of the model is quantised as {parts[0].dtype}; give its original weights, or a GGUF file"
        )
    parts = [(part.T if rows.transposed else part).float() for part in parts]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    if name == "position_embedding.weight":
        tensor = tensor[: shape[0]]  # the context may be shorter
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{' and '.join(rows.names)} of the model make a tensor of shape {tuple(tensor.shape)}, and its "
            f"configuration asks for {shape}; download it again"
        )
    return tensor.contiguous()


def to_theirs(tensors: Mapping[str, Rows], model: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the family, by name, made from `ours`, the tensors of a checkpoint of `model`."""
    heads, keys = model.heads * model.head_width, model.key_heads * model.head_width
    theirs: dict[str, Tensor] = {}
    for name, rows in table_of(tensors, {name: tensor.shape for name, tensor in ours.items()}).items():
        parts = ours[name].split((heads, keys, keys)) if len(rows.names) > 1 else (ours[name],)
        theirs |= {target: part.T if rows.transposed else part for target, part in zip(rows.names, parts, strict=True)}
    return theirs


def full_names(names: Collection[str], prefix: str) -> dict[str, str]:
    """The full name of each tensor, by its name in a file that may leave out the `prefix` of all but the head."""
    is_full = any(name.startswith(prefix) for name in names)
    return {name: name if is_full or name == HEAD else prefix + name for name in names}
