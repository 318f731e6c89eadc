"""The tokenizer of a model of another tool: what begins and ends a document, and a token for each row of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from cda_cli.data import tokenizer_from_json
from cda_cli.errors import CheckpointError
from cda_cli.interchange.source_tokenizer import SourceTokenizer, fitted, tokenizer_of_folder

SIZE = 8
TEMPLATE = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 5)])
BOTH_ENDS = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 6)])


def save(folder: Path, template: Any = None, said: dict[str, Any] | None = None) -> SourceTokenizer:
    """The tokenizer of a folder whose tokenizer.json has `template`, and whose tokenizer_config.json says `said`."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "d": 3, "<unk>": 4, "<s>": 5, "</s>": 6, "<|im_end|>": 7}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>"])
    made.enable_truncation(1)
    if template is not None:
        made.post_processor = template
    made.save(str(folder / "tokenizer.json"))
    if said is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return tokenizer_of_folder(folder, {"eos_token_id": [6, 7]})


@pytest.mark.parametrize(
    ("template", "said", "bos", "eos"),
    [
        (None, None, None, "</s>"),
        (TEMPLATE, None, "<s>", "</s>"),
        (BOTH_ENDS, None, None, "</s>"),
        (TEMPLATE, {"add_bos_token": False}, None, "</s>"),
        (None, {"bos_token": "<s>"}, None, "</s>"),
        (None, {"bos_token": "<s>", "add_bos_token": True}, "<s>", "</s>"),
        (None, {"bos_token": {"content": "<s>"}, "add_bos_token": True}, "<s>", "</s>"),
        (TEMPLATE, {"bos_token": None, "eos_token": "<|im_end|>"}, "<s>", "<|im_end|>"),
        (None, {"eos_token": "not in the vocabulary"}, None, "</s>"),
    ],
)
def test_the_first_and_the_last_token_are_those_of_the_source(
    template: Any, said: dict[str, Any] | None, bos: str | None, eos: str, tmp_path: Path
) -> None:
    found = save(tmp_path, template, said)
    assert (found.bos, found.eos) == (bos, eos)
    ours = tokenizer_from_json(found.text, bos=found.bos, eos=found.eos)
    assert list(ours.encode("a b c")) == [0, 1, 2], "the tokenizer still cuts a text off, or adds tokens to it"
    assert ours.vocab_size == SIZE
    assert ours.separator == {"</s>": 6, "<|im_end|>": 7}[eos]


@pytest.mark.parametrize("rows", [SIZE, SIZE + 1, SIZE + 5])
def test_each_row_of_the_embedding_gets_a_token_that_no_text_spells(rows: int, tmp_path: Path) -> None:
    source = save(tmp_path)
    found = fitted(source, rows)
    ours = tokenizer_from_json(found.text, bos=found.bos, eos=found.eos)
    assert ours.vocab_size == rows
    spelled = ours.encode(" ".join(f"<|unused_{id}|>" for id in range(rows)))
    assert set(spelled) == {4}, "a text may spell a row that the model was never trained on"
    assert list(ours.encode("a b")) == [0, 1]


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="8 tokens and the model 7; give --tokenizer"):
        fitted(save(tmp_path), SIZE - 1)
