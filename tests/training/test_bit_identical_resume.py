"""A run that was cut anywhere ends where an uninterrupted one does, to the last bit: on a CPU in float32, and on a GPU
with deterministic settings in float32 and bf16, compiled and not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cda_cli.config import Config
from cda_cli.errors import InterruptedRunError
from cda_cli.runtime import cpu_threads, describe_device
from cda_cli.storage import locate
from cda_cli.storage.manifest import MANIFEST, write_manifest
from tests.devices import DEVICES
from tests.training.helpers import Memory, changed, losses, trained, with_settings

# A GPU's usual case: steps begin ahead, compiled, with the kernels around attention.
AHEAD: dict[str, Any] = {
    "model.dropout": 0.0, "model.eps_anneal_start": None, "model.attn_k": 2.0, "model.position": "rotary",
    "model.qk_norm": True,
}  # fmt: skip
# What each case changes of the settings. k ≤ 2 and a larger one take different kernels; softmax takes flash attention
# in bf16 without a null key, and another one elsewhere; where ε is annealed nothing is compiled.
ON_CPU: dict[str, dict[str, Any]] = {"cpu": {}}
ON_GPU: dict[str, dict[str, Any]] = {
    "float32": {"run.dtype": "float32"},
    "bf16": {"run.dtype": "bfloat16"},
    "bf16, k = 2": {"run.dtype": "bfloat16", "model.attn_k": 2.0},
    "softmax, float32": {"run.dtype": "float32", "model.attention": "softmax"},
    "softmax, bf16": {"run.dtype": "bfloat16", "model.attention": "softmax", "model.null_kv": 0},
    "compiled, bf16, no CUDA graphs": {
        "run.dtype": "bfloat16", "run.compile": True, "run.cuda_graphs": False, "model.eps_anneal_start": None,
        "model.attn_k": 2.0, "model.tied_embeddings": True, "model.position": "rotary",
    },
    "compiled, bf16": {"run.dtype": "bfloat16", "run.compile": True, "model.eps_anneal_start": None},
    "compiled, bf16, begun ahead": {"run.dtype": "bfloat16", "run.compile": True} | AHEAD,
    "compiled, softmax, float32": {
        "run.dtype": "float32", "run.compile": True, "model.eps_anneal_start": None, "model.attention": "softmax",
    },
}  # fmt: skip
CASES = ON_CPU | {
    f"{device}, {name}": {"run.device": device, "run.deterministic": True, "run.compile": False} | settings
    for device in DEVICES[1:]
    for name, settings in ON_GPU.items()
}
CUTS = [("cpu", [1]), ("cpu", [4]), ("cpu", [11]), ("cpu", [*range(1, 12)])]
CUTS += [(case, [3, 4, 9]) for case in CASES if case not in ON_CPU]
STOPS = [("cpu", 2), ("cpu", 8), *((case, 5) for case in CASES)]
ON_REQUEST = [
    (case, settings)
    for case in CASES
    if case in ("cpu", "cuda, bf16")
    for settings in ({"optimizer": "muon"}, {"ema_decay": 0.6})
]
# A step that draws random numbers does not begin before the one before it is over.
BETWEEN: list[dict[str, Any]] = [
    AHEAD | {"run.compile": None},
    {"model.dropout": 0.0, "model.eps_anneal_start": None},
    {"model.dropout": 0.0, "model.eps_anneal_start": None, "optim.optimizer": "muon"},
    {"model.dropout": 0.0},
    {"model.eps_anneal_start": None},
]
GRAPHED: list[dict[str, Any]] = [
    {"optim.grad_accum": 1},
    {"optim.grad_accum": 3, "model.attn_k": 2.0, "optim.ema_decay": 0.6},
    {"model.attention": "softmax", "model.ff": "gelu", "run.activation_checkpointing": True},
    AHEAD,
]


class Whole(NamedTuple):
    """A run without a cut, and its settings."""

    config: Config
    run: Path


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Twelve steps of the case that a test is about."""
    folder, asked = tmp_path_factory.mktemp("whole"), with_settings(config, CASES[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDA_CACHE", str(folder / "cache"))
        trained_afresh(asked, folder / "run")
    assert sorted(losses(folder / "run")) == list(range(1, 13))
    return Whole(asked, folder / "run")


def trained_afresh(config: Config, run: Path, stop_after: int | None = None) -> Memory:
    """Trains, as a process of its own would, without what an earlier run has compiled."""
    torch._dynamo.reset()
    return trained(config, run, stop_after=stop_after)


def assert_same_end(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole), "a loss differs: data, dropout, weights or optimizer were not restored"
    names = {file.name for file in locate(whole).iterdir()}
    assert {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"} < names
    for name in sorted(names):
        assert (locate(run) / name).read_bytes() == (locate(whole) / name).read_bytes(), f"{name} differs at the end"


@pytest.mark.parametrize(("whole", "cuts"), CUTS, indirect=["whole"])
def test_a_run_that_ended_early_and_goes_on(whole: Whole, tmp_path: Path, cuts: list[int]) -> None:
    """Also across a validation, a sample and a checkpoint, which must not draw from what training draws from."""
    for steps in [*cuts, 12]:
        trained_afresh(changed(whole.config, steps=steps), tmp_path / "run")
    assert_same_end(tmp_path / "run", whole.run)


@pytest.mark.parametrize(("whole", "step"), STOPS, indirect=["whole"])
def test_a_run_that_was_stopped_and_goes_on(whole: Whole, tmp_path: Path, step: int) -> None:
    """The step in hand when the signal came is in the checkpoint, whole."""
    with pytest.raises(InterruptedRunError, match=f"stopped at step {step} of 12, and saved"):
        trained_afresh(whole.config, tmp_path / "run", stop_after=step)
    assert list(losses(tmp_path / "run")) == list(range(1, step + 1))
    assert locate(tmp_path / "run").name == f"step-{step:08}"
    trained_afresh(whole.config, tmp_path / "run")
    assert_same_end(tmp_path / "run", whole.run)


@pytest.mark.parametrize("whole", CASES, indirect=True)
def test_steps_after_the_last_checkpoint_are_redone_the_same(whole: Whole, tmp_path: Path) -> None:
    """A kill leaves figures of steps that no checkpoint has; done again, they are the same."""
    run = tmp_path / "run"
    trained_afresh(changed(whole.config, steps=4), run)
    with pytest.raises(InterruptedRunError):
        trained_afresh(whole.config, run, stop_after=6)
    first = losses(run)
    for file in (run / "checkpoints" / "step-00000006").iterdir():
        file.unlink()
    trained_afresh(whole.config, run)
    assert {step: loss for step, loss in losses(run).items() if step <= 6} == first
    assert_same_end(run, whole.run)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("asked", BETWEEN, ids=str)
def test_what_a_stopped_run_had_begun_is_begun_again(
    config: Config, tmp_path: Path, asked: dict[str, Any], device: str
) -> None:
    """Where nothing is due between two steps, the next one begins before the request to stop is answered."""
    each = with_settings(config, {"run.device": device, "run.deterministic": True, "run.compile": False} | asked)
    rarely = {"run.log_every": 9, "run.eval_every": 9, "run.save_every": 9, "run.sample_every": 0}
    asked_for = with_settings(each, rarely)
    trained_afresh(each, tmp_path / "each")
    for step in (1, 2, 5, 11):
        with pytest.raises(InterruptedRunError, match=f"stopped at step {step} of 12"):
            trained_afresh(asked_for, tmp_path / "run", stop_after=step)
    trained_afresh(asked_for, tmp_path / "run")
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (locate(tmp_path / "run") / name).read_bytes() == (locate(tmp_path / "each") / name).read_bytes(), name
    states = [json.loads((locate(tmp_path / run) / "state.json").read_text()) for run in ("run", "each")]
    found, expected = ({name: value for name, value in state.items() if name != "config"} for state in states)
    assert found == expected, "the position in the data, or the optimizer's state, is another"


@pytest.mark.parametrize(("case", "settings"), ON_REQUEST, ids=str)
def test_what_is_on_request_goes_on_as_exactly(
    config: Config, tmp_path: Path, case: str, settings: dict[str, object]
) -> None:
    """State of other optimizers and averages."""
    asked = changed(with_settings(config, CASES[case]), **settings)
    trained_afresh(asked, tmp_path / "whole")
    for steps in (2, 5, 12):
        trained_afresh(changed(asked, steps=steps), tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("asked", "device"),
    # Whatever the model is, a CPU runs no graphs.
    [(GRAPHED[1], "cpu"), *itertools.product(GRAPHED, [f"cuda:{n}" for n in range(torch.cuda.device_count())])],
    ids=str,
)
def test_cuda_graphs_change_no_bit(config: Config, tmp_path: Path, device: str, asked: dict[str, Any]) -> None:
    """Replayed, the kernels are the same, in the same order, and so are dropout's numbers. On a CPU there are none."""
    on_device = {"run.device": device, "run.deterministic": True, "run.compile": device != "cpu"}
    config = with_settings(config, ON_GPU["compiled, bf16"] | asked | on_device)
    by_default = trained_afresh(config, tmp_path / "default")
    wanted = trained_afresh(with_settings(config, {"run.cuda_graphs": True}), tmp_path / "wanted")
    none = trained_afresh(with_settings(config, {"run.cuda_graphs": False}), tmp_path / "none")
    assert losses(tmp_path / "default") == losses(tmp_path / "wanted") == losses(tmp_path / "none")
    on_a_gpu = device != "cpu"
    assert [run.plan.cuda_graphs for run in (by_default, wanted, none)] == [on_a_gpu, on_a_gpu, False]
    told = [any(note.startswith("CUDA graphs are off") for note in run.notes) for run in (by_default, wanted, none)]
    assert told == [False, not on_a_gpu, False], "who asks for graphs is told why there are none, and nobody else"


@pytest.mark.parametrize("whole", CASES, indirect=True)
def test_another_seed_is_another_run(whole: Whole, tmp_path: Path) -> None:
    """Else the equalities above would show nothing."""
    trained_afresh(with_settings(whole.config, {"run.seed": 1}), tmp_path / "run")
    assert not set(losses(tmp_path / "run").values()) & set(losses(whole.run).values())


@pytest.mark.parametrize(("threads", "used"), [(None, 2), (3, 3)])
def test_a_run_on_a_cpu_keeps_its_number_of_threads(
    config: Config, tmp_path: Path, threads: int | None, used: int
) -> None:
    """Their number decides how sums are cut: a run that is resumed on fewer cores would end with other bits."""
    here = torch.get_num_threads()
    run = tmp_path / "run"
    with cpu_threads(2):
        trained(changed(config, steps=4), run)
    resumed = trained(with_settings(config, {"run.threads": threads}), run)
    assert resumed.plan.device == f"cpu ({used} threads)"
    assert json.loads((locate(run) / "state.json").read_text())["threads"] == used
    assert any("with 2 CPU threads, as it began" in note for note in resumed.notes) == (threads is None)
    assert torch.get_num_threads() == here, "the number of this process has changed"


@pytest.mark.parametrize("threads", [0, -1, 10**9, 2.0, True, "2", None])
def test_a_number_of_threads_that_no_machine_has_is_passed_over(
    config: Config, tmp_path: Path, threads: object
) -> None:
    run = tmp_path / "run"
    trained(changed(config, steps=4), run)
    state = locate(run) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"threads": threads}))
    (state.parent / MANIFEST).unlink()
    write_manifest(state.parent)
    assert trained(changed(config, steps=5), run).plan.device == describe_device(torch.device("cpu"))
