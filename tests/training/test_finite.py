"""Steps that are refused: which, how many in a row, and what the run then says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cda_cli.errors import TrainingError
from cda_cli.storage import publish, step_folder
from cda_cli.training.finite import Refusals, require_finite_weights

ONE = torch.tensor(1.0)
BAD = [torch.tensor(float(word)) for word in ("nan", "inf", "-inf")]


def saved(run: Path, *steps: int) -> None:
    for step in steps:
        publish(run, step=step, model={}, optimizer={}, rng={}, state={"step": step}, keep=9)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_what_is_not_finite_is_refused(tmp_path: Path, bad: Tensor) -> None:
    """In the loss alone, in the gradient alone, or in both; and said as it was seen."""
    refusals = Refusals(tmp_path, limit=9)
    assert not refusals.refuses(ONE, ONE)
    assert refusals.refuses(bad, ONE)
    assert refusals.figures(7) == {"step": 7, "saw": f"loss {bad.item():.4g}, gradient norm 1", "in_a_row": 1}
    assert refusals.refuses(ONE, bad)
    assert refusals.refuses(bad, -bad)
    assert refusals.figures(7)["in_a_row"] == 3


def test_only_those_in_a_row_count(tmp_path: Path) -> None:
    """A bad batch now and then costs nothing but itself."""
    refusals = Refusals(tmp_path, limit=2)
    for _ in range(5):
        assert refusals.refuses(BAD[0], ONE)
        refusals.check(3)
        assert not refusals.refuses(ONE, ONE)
        refusals.check(3)
    for _ in range(2):
        refusals.refuses(ONE, BAD[1])
    with pytest.raises(TrainingError, match=r"at step 3, with 2 batches in a row \(loss 1, gradient norm inf\)"):
        refusals.check(3)


def test_the_last_good_checkpoint_is_named(tmp_path: Path) -> None:
    """Not one of the very weights that failed, and not a damaged one."""

    def said(step: int) -> str:
        refusals = Refusals(tmp_path, limit=1)
        refusals.refuses(*BAD[:2])
        with pytest.raises(TrainingError) as caught:
            refusals.check(step)
        return str(caught.value)

    assert said(5).endswith("start again with a smaller --lr")
    saved(tmp_path, 2, 4)
    assert said(2).endswith("start again with a smaller --lr and another --out")
    assert said(6).endswith(f"{step_folder(tmp_path, 4)}; go on from it (--resume) with a smaller --lr")
    assert said(5).endswith(
        f"{step_folder(tmp_path, 2)}; go on from it (--resume) with a smaller --lr and another --out"
    )
    (step_folder(tmp_path, 4) / "state.json").unlink()
    assert f"{step_folder(tmp_path, 2)}; go on" in said(9)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_weights_that_are_not_finite_are_named(bad: Tensor) -> None:
    """A step with a finite gradient can still overflow: by its rate, or by weight decay."""
    require_finite_weights(3, {"a": torch.ones(4), "none": torch.ones(0), "whole": torch.tensor(3)})
    with pytest.raises(
        TrainingError, match=r"^b is not finite after step 3, so that these weights are not saved; go on"
    ):
        require_finite_weights(3, {"a": torch.ones(4), "b": torch.stack([ONE, bad])})
