"""`cda presets`: what each is for, its shape as the model has it, and its file."""

from __future__ import annotations

import json

import pytest
import torch

from cda_cli.config import preset_purpose, resolve
from cda_cli.console.base import count
from cda_cli.model import Transformer
from cda_cli.settings import PRESET_FOLDER, preset_names
from tests.commands.helpers import Cda, assert_refused


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_how_many_parameters_it_has_and_what_it_is_for(name: str) -> None:
    """In the first line of its file, `# N parameters: PURPOSE`, which the table shows."""
    with torch.device("meta"):
        model = Transformer(resolve(name).model)
    parameters, purpose = preset_purpose(name)
    assert parameters == count(sum(parameter.numel() for parameter in model.parameters()))
    assert purpose.endswith(".")


def test_the_table_has_each_preset_from_small_to_large(cda: Cda) -> None:
    result = cda("presets")
    assert (result.code, result.err) == (0, "")
    table, _, purposes = result.out.partition("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["tiny", "seed", "small", "base"]
    tiny = " ".join(table.splitlines()[1].split())
    assert tiny == "tiny 825 k 4×128 4 256 8 coordinate-descent ≤ 2 0.5"
    for name in preset_names():
        assert preset_purpose(name)[1][1:] in purposes


@pytest.mark.parametrize("name", preset_names())
def test_a_name_prints_its_file(cda: Cda, name: str) -> None:
    assert cda("presets", name).out == (PRESET_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def test_json_has_all_of_their_settings(cda: Cda) -> None:
    documents = json.loads(cda("presets", "--json").out)
    assert sorted(documents) == preset_names()
    for name, document in documents.items():
        assert document["config"] == resolve(name).model_dump()
    assert list(json.loads(cda("presets", "tiny", "--json").out)) == ["tiny"]


def test_an_unknown_preset_is_refused(cda: Cda) -> None:
    assert_refused(cda("presets", "tinny"), "did you mean 'tiny'?")
