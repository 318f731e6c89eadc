"""The causal checks of `cda eval`: their words, their tables and `--json`, and `--fail-if`."""

from __future__ import annotations

import json
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cda_cli.causal import Checks, Wanted
from cda_cli.errors import InterruptedRunError
from cda_cli.evaluation import Plan, evaluate_readings, open_readings
from cda_cli.restore import open_side, restore_on
from cda_cli.signals import StopRequest
from tests.commands.helpers import Cda, assert_refused

ABLATIONS = ("ablations", "cumulative_ablations")
DOCS = Path(__file__).parents[2] / "docs"
SHORT = ("--max-batches", 2, "--batch-size", 4)


def evaluated(cda: Cda, *arguments: object) -> dict[str, Any]:
    result = cda("eval", *arguments, *SHORT, "--json")
    assert result.code == 0, result.err
    assert result.err == ""
    document = json.loads(result.out)
    assert isinstance(document, dict)
    return document


def fields(document: Any) -> set[str]:
    """The names of all fields, those of the objects in it included."""
    values = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    return set(document if isinstance(document, dict) else ()).union(*map(fields, values))


def test_every_check_is_in_the_document_and_in_the_tables(cda: Cda, finished: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    asked = [
        "--cut", "top:1..4", "--cut", "units:4", "--as", "gate", "--as", "k*1.01", "--ablate", "heads",
        "--ablate", "heads:random", "--tolerance", 5, "--plot", picture, "--by-position", "--calibration",
    ]  # fmt: skip
    found = evaluated(cda, finished, *asked)
    names = [one["name"] for kind in ("cuts", "unit_cuts", "substitutes", *ABLATIONS) for one in found[kind]]
    heads = ["head[0.0]", "head[0.1]", "head[1.0]", "head[1.1]"]
    together = ["heads-by-random[1]", "heads-by-random[2]", "heads-by-random[4]"]
    assert names == ["top[1]", "top[2]", "top[4]", "units[4]", "gate", "k-times[1.01]", *heads, *together]
    assert set(found["rank_correlations"]) == {"support", "capped", "k", "gradient"}
    assert [(one["name"], one["kept"]) for one in found["held_out"]] == [("held-out[top]", 1), ("held-out[units]", 4)]
    assert 0 <= found["substitutes"][0]["gate_equivalent_rows"] <= 1
    for kind in ("cuts", "substitutes", *ABLATIONS):
        for one in found[kind]:
            difference = one["bits_per_byte"] - found["bits_per_byte"]
            assert one["difference"] == pytest.approx(difference), one["name"]
            low, high = one["difference_interval"]
            assert low <= one["difference"] <= high
    shown = cda("eval", finished, *SHORT, *asked)
    assert shown.code == 0
    assert shown.err == ""
    for one in (found["cuts"][0], found["substitutes"][0], found["ablations"][2]):
        assert f"{one['difference']:+.4f}" in shown.out
    for words in ("top 1", "units 4", "k·softmax(s/ε)", "k × 1.01", "without head 1.1", "gate-equivalent"):
        assert words in shown.out
    assert picture.read_bytes().startswith(b"<?xml")
    pages = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("evaluation.md", "causal-checks.md"))
    undefined = {field for field in fields(found) if f"`{field}`" not in pages}
    undefined = {field for field in undefined if f"`{re.sub('_(error|interval)$', '', field)}`" not in pages}
    assert not undefined, "no page defines these"


@pytest.mark.parametrize(
    ("condition", "code"), [("top[1].difference_hi > 100", 0), ("top[1].difference_hi > -100", 3), ("lss > 1", 2)]
)
def test_a_condition_decides_the_exit_code_once_the_result_is_out(
    cda: Cda, finished: Path, condition: str, code: int
) -> None:
    result = cda("eval", finished, *SHORT, "--cut", "top:1", "--json", "--fail-if", condition)
    assert json.loads(result.out)["cuts"]
    if code:
        assert_refused(result, {3: "top[1].difference_hi is ", 2: "did you mean 'loss'"}[code], code=code)
    else:
        assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--as", "gatee"), "did you mean 'gate'"),
        (("--ablate", "units"), "unknown"),
        (("--ablate", "heads:suport"), "did you mean 'support'"),
        (("--tolerance", 0.1), "--cut top:1..64"),
        (("--plot", "curve.png"), "--cut top:1..64"),
        (("--cut", "top:1", "--plot", "curve.gif"), ".png, .svg, .pdf"),
        (("--fail-if", "loss"), "no condition"),
    ],
)
def test_a_wrong_word_is_refused_before_the_checkpoint_is_read(
    cda: Cda, tmp_path: Path, asked: tuple[object, ...], words: str
) -> None:
    assert_refused(cda("eval", tmp_path / "no-run", *asked), words)


def test_an_interrupt_ends_the_checks_within_a_batch(finished: Path) -> None:
    """A batch is measured once for every change, which may take minutes."""
    done: list[int] = []

    def interrupt(windows: int) -> None:
        if windows:
            done.append(windows)
            signal.raise_signal(signal.SIGINT)

    def checked(stop: StopRequest) -> None:
        plan = Plan(batch_size=4, max_batches=1)
        open_text = partial(open_side, data=None, split=None, stop=stop, show_progress=False)
        readings = open_readings([finished], plan, open_text)
        restore = partial(restore_on, device="cpu", dtype="float32", backend="auto")
        ways = Checks(Wanted.parse(["top:1..8"], [], [])).ways
        evaluate_readings(plan, readings, restore, stop, interrupt, further=ways)

    with StopRequest() as stop, pytest.raises(InterruptedRunError):
        checked(stop)
    assert done == [4]
