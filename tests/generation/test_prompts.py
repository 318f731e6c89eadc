"""Prompts as they are read: a line of JSONL with settings of its own, and one sentence for a wrong line."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cda_cli.errors import ConfigError
from cda_cli.generation import SamplingSettings
from cda_cli.generation.prompts import STDIN, Prompt, PromptSettings, plan_samples, read_prompts

DEFAULTS = PromptSettings(temperature=0.5, top_k=7)


def read(*lines: object) -> list[Prompt]:
    """Reads JSON lines from stdin; what is no text is written as JSON."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return read_prompts((), STDIN, io.TextIOWrapper(io.BytesIO(text.encode())), DEFAULTS)


def test_a_line_overrides_what_it_names_and_no_more() -> None:
    own: dict[str, Any] = {
        "max_new_tokens": 3, "temperature": 1, "top_k": None, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": -1, "stop": ["\n", "END"], "logprobs": 2, "num_samples": 4,
    }  # fmt: skip
    first, second = read({"prompt": "a", "seed": 5} | own, {"prompt": "b"})
    assert first.settings.model_dump() == own | {"stop": ("\n", "END")}
    assert first.settings.sampling == SamplingSettings(1.0, None, 0.9, 0.1, 1.2, -1.0)
    assert (first.text, first.seed, first.fields) == ("a", 5, {})
    assert second == Prompt("b", DEFAULTS)


def test_every_sampling_setting_can_be_set() -> None:
    """A setting that is added to one of the two classes alone would be ignored."""
    assert set(SamplingSettings._fields) <= set(PromptSettings.model_fields)
    for name in SamplingSettings._fields:
        assert getattr(PromptSettings().sampling, name) == getattr(SamplingSettings(), name)


def test_one_stop_string_needs_no_list() -> None:
    assert read({"prompt": "a", "stop": "\n\n"})[0].settings.stop == ("\n\n",)


def test_other_fields_are_carried_as_they_are() -> None:
    carried = {"id": "x-1", "gold": {"answer": [1, None]}, "prompt_id": 7}
    [prompt] = read({"prompt": "a", **carried})
    assert prompt.fields == carried


def test_lines_are_read_as_other_prompts_are() -> None:
    """Empty lines are none, a byte order mark is no JSON, and a lone surrogate has no UTF-8."""
    prompts = read("\ufeff" + '{"prompt": "a\\ud800"}\r', "", "\r", '{"prompt": "\\u2028"}')
    assert [prompt.text for prompt in prompts] == ["a?", "\u2028"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": ', "is no JSON (Expecting value"),
        ("[" * 100_000, "is no JSON"),
        ('"a"', 'has no prompt; write an object such as {"prompt": "Once upon", "seed": 1}'),
        ({"text": "a"}, "has no prompt"),
        ({"prompt": None}, "has no prompt"),
        ({"prompt": ["a"]}, "has no prompt"),
        ({"prompt": "a", "seed": -1}, "seed = -1 is not possible; give a whole number from 0"),
        ({"prompt": "a", "seed": 1.5}, "seed = 1.5 is not possible"),
        ({"prompt": "a", "seed": True}, "seed = True is not possible"),
        ({"prompt": "a", "seed": 2**63}, "is not possible"),
        ({"prompt": "a", "temperature": "hot"}, "temperature = 'hot' is not possible: input should be a valid number"),
        ({"prompt": "a", "temperature": True}, "temperature = True is not possible"),
        ({"prompt": "a", "temperature": -1}, "--temperature must be 0 or more, not -1.0"),
        ('{"prompt": "a", "temperature": NaN}', "--temperature must be 0 or more, not nan"),
        ({"prompt": "a", "max_new_tokens": 2.5}, "max_new_tokens = 2.5 is not possible"),
        ({"prompt": "a", "max_new_tokens": -1}, "input should be greater than or equal to 0"),
        ({"prompt": "a", "num_samples": 0}, "input should be greater than or equal to 1"),
        ({"prompt": "a", "logprobs": 0}, "input should be greater than or equal to 1"),
        ({"prompt": "a", "top_p": 2}, "--top-p is a share"),
        ({"prompt": "a", "repetition_penalty": 0}, "--repetition-penalty must be above 0 and finite, not 0"),
        ('{"prompt": "a", "presence_penalty": NaN}', "--presence-penalty must be finite, not nan"),
        ({"prompt": "a", "stop": [1]}, "stop = 1 is not possible: input should be a valid string"),
        ({"prompt": "a", "stop": ""}, "--stop is empty"),
        ({"prompt": "a", "top-k": 3}, "there is no setting 'top-k'; did you mean 'top_k'?"),
        ({"prompt": "a", "temprature": 3}, "did you mean 'temperature'?"),
        ({"prompt": "a", "text": "b"}, "'text' is a field of the output; give that field of the input another name"),
    ],
    ids=str,
)
def test_a_wrong_line_is_one_sentence_with_its_number(line: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read({"prompt": "fine"}, "", line)
    assert str(refused.value).startswith("stdin, line 3")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl, line 2 is no JSON"):
        read_prompts((), file, io.StringIO(), DEFAULTS)
    with pytest.raises(ConfigError, match="exclude each other"):
        read_prompts(["a"], file, io.StringIO(), DEFAULTS)
    with pytest.raises(ConfigError, match="stdin holds no prompt"):
        read("")


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("a.txt", '{"prompt": "a"}', '{"prompt": "a"}'),
        ("a.jsonl", '{"prompt": "a"}', "a"),
        ("a.NDJSON", '{"prompt": "a"}', "a"),
        ("pipe", '{"prompt": "a"}', "a"),
        ("pipe", '"a"', '"a"'),
        ("a.jsonl", "a", None),
        ("pipe", "{", None),
    ],
)
def test_the_ending_says_what_a_file_holds(name: str, line: str, expected: str | None, tmp_path: Path) -> None:
    """Without an ending its first character does. A text of prompts may begin with a brace."""
    (tmp_path / name).write_text(line)
    with nullcontext() if expected else pytest.raises(ConfigError, match="is no JSON"):
        [prompt] = read_prompts((), tmp_path / name, io.StringIO(), DEFAULTS)
        assert prompt.text == expected


def test_each_sample_takes_the_next_seed() -> None:
    """A prompt with a seed of its own counts from there, and moves no seed of the others."""
    prompts = read({"prompt": "a", "num_samples": 2}, {"prompt": "b", "seed": 90, "num_samples": 2}, {"prompt": "c"})
    samples = plan_samples(prompts, 10)
    assert [(each.place, each.number, each.seed) for each in samples] == [
        (1, 1, 10), (1, 2, 11), (2, 1, 90), (2, 2, 91), (3, 1, 14),
    ]  # fmt: skip


def test_a_seed_too_many_is_refused() -> None:
    [prompt] = read({"prompt": "a", "seed": 2**63 - 1, "num_samples": 2})
    with pytest.raises(ConfigError, match=f"^--seed {2**63 - 1} is too large for 2 samples; give a smaller one$"):
        plan_samples([prompt], 0)
