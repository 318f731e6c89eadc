"""A run in several processes, over gloo, has the losses and files of the run in one, and one process prints."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cda_cli.config import Config, dump_yaml, parse
from cda_cli.errors import ConfigError
from cda_cli.model import Transformer
from cda_cli.signals import StopRequest
from cda_cli.storage import load, locate
from cda_cli.training.distributed.launch import Mesh, Place, count_processes, launch
from cda_cli.training.distributed.processes import Processes
from tests.commands.helpers import OVERFLOWING, contents, metrics
from tests.training.helpers import changed, losses, trained, with_settings
from tests.training.processes import Nursery

STEPS, HALF = 8, 4
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("said")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def small(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Settings without dropout, with four sequences a step.

    The text is so short that its last window, which has few targets, is drawn.
    """
    text = tmp_path_factory.mktemp("text") / "short.txt"
    text.write_text(Path(config.data.source).read_text(encoding="utf-8")[:500], encoding="utf-8")
    values = config.model_dump()
    values["model"] |= {"dropout": 0.0, "tied_embeddings": True, "null_kv": 0}
    values["data"] |= {"source": str(text)}
    values["optim"] |= {"steps": STEPS, "schedule_steps": STEPS, "ema_decay": 0.9}
    values["run"] |= {"eval_every": HALF, "save_every": HALF}
    return parse(values)


@pytest.fixture(scope="module")
def alone(small: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process with which the others are compared."""
    run = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDA_CACHE", str(run.parent / "cache"))
        trained(small, run)
    return run


def settings(config: Config, folder: Path) -> Path:
    path = folder / "settings.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(("parallel", "batches"), [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2), ("cp", 1)])
def test_the_number_of_processes_changes_no_loss(
    nursery: Nursery, small: Config, alone: Path, tmp_path: Path, parallel: str, batches: int
) -> None:
    """Neither does the number of batches in each process. Gradient norm, what the layers select, data position and
    checkpoints are the same too, and only the first process prints."""
    run, optim = tmp_path / "run", small.optim
    finer = ("--batch-size", optim.batch_size // batches, "--grad-accum", optim.grad_accum * batches)
    evaluation = ("--set", f"run.eval_batches={small.run.eval_batches * batches}")
    command = ("train", "--config", settings(small, tmp_path), "--out", run, "--parallel", parallel, "--steps", HALF)
    ended = nursery.run(2, *command, *finer, *evaluation)
    assert ended.codes == [0, 0], ended.err
    assert f"processes  2, {parallel}" in ended.out[0]
    assert not any(ended.out[1:] + ended.err), "a process that is not the first one spoke"
    expected = {step: loss for step, loss in losses(alone).items() if step <= HALF}
    assert len(expected) == HALF
    assert losses(run) == pytest.approx(expected, rel=0, abs=TOLERANCE)
    for kind, figure in (("train", "grad_norm"), ("validation", "loss")):
        wanted = {record["step"]: record[figure] for record in metrics(alone, kind) if record["step"] <= HALF}
        assert {record["step"]: record[figure] for record in metrics(run, kind)} == pytest.approx(wanted, rel=1e-5)
    for one, several in zip(metrics(alone, "train"), metrics(run, "train"), strict=False):
        for layer, expected_layer in zip(several["layers"], one["layers"], strict=True):
            assert layer == pytest.approx(expected_layer, rel=1e-4)
    last = f"step-{HALF:08}"
    names = {name: re.sub(r"-[0-9]{5}-of-[0-9]{5}", "", name) for name in contents(locate(run))}
    assert set(names.values()) == contents(alone / "checkpoints" / last).keys()
    for part in ("model", "optimizer", "ema"):
        shards = [f"{part}-{number:05}-of-00002.safetensors" for number in (1, 2)]
        assert sorted(name for name, whole in names.items() if whole == f"{part}.safetensors") == shards
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    saved, expected_save = load(run / "checkpoints" / last), load(alone / "checkpoints" / last)
    for name in ("step", "tokens", "position"):
        assert saved.state[name] == expected_save.state[name]
    for part in ("model", "optimizer", "ema"):
        torch.testing.assert_close(getattr(saved, part), getattr(expected_save, part), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def plain(small: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Two steps in one process of a model with less in it: what compiling costs grows with every operator."""
    values, run = small.model_dump(), tmp_path_factory.mktemp("plain") / "run"
    values["model"] |= {"depth": 1, "ff": "gelu", "learned_k": False, "output_gate": False}
    values["optim"] |= {"steps": 2}
    values["run"] |= {"eval_every": 0, "sample_every": 0, "eval_batches": 1}
    config = parse(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDA_CACHE", str(run.parent / "cache"))
        trained(config, run)
    return config, run


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_it_is_the_same_run(
    nursery: Nursery, plain: tuple[Config, Path], tmp_path: Path, parallel: str
) -> None:
    """Without compiling, the losses are the same but for rounding. Each process has two batches.

    The model is compiled as one, with the same shapes for both, so that the second finds the code of the first.
    """
    (config, alone), run = plain, tmp_path / "run"
    finer = ("--batch-size", config.optim.batch_size // 2, "--grad-accum", config.optim.grad_accum * 2)
    command = ("train", "--config", settings(config, tmp_path), "--out", run, "--parallel", parallel, "--compile")
    ended = nursery.run(2, *command, *finer)
    assert ended.codes == [0, 0], ended.err
    assert "compiled" in ended.out[0]
    assert losses(run) == pytest.approx(losses(alone), rel=0, abs=1e-5)


def test_muon_in_several_processes(nursery: Nursery, small: Config, tmp_path: Path) -> None:
    """Muon makes its matrices orthogonal in bfloat16, which shows the last bit of a gradient, so the bound is wider."""
    config, runs = changed(small, optimizer="muon"), [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        count = 1 + runs.index(run)
        assert nursery.run(count, "train", "--config", settings(config, tmp_path), "--out", run).codes == [0] * count
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=0, abs=1e-5)
    for settings_of_run, remedy in (
        ({"run.parallel": "fsdp"}, "fsdp cuts them; give --parallel ddp"),
        ({"run.mesh": "dp=1,cp=2"}, "a mesh cuts them; give --parallel cp and --set run.mesh=null"),
    ):
        sharded = with_settings(config, settings_of_run)
        assert count_processes(sharded, Place(), 1, dry_run=False) == 1
        with pytest.raises(ConfigError, match=f"Muon takes whole matrices, and {remedy}"):
            count_processes(sharded, Place(), 2, dry_run=False)


def test_every_model_divides_its_sequences(nursery: Nursery) -> None:
    """Each attention rule and kind of position, with null keys and shared ones, has the loss and the gradients that it
    has alone, also where blocks are computed again."""
    ended = nursery.run(2, module="tests.training.divided_sequences")
    assert ended.codes == [0, 0], ended.err


def test_auxiliary_losses_and_truncated_steps_in_several_processes(
    nursery: Nursery, plain: tuple[Config, Path], tmp_path: Path
) -> None:
    """Values and multiplier are those of the whole batch, whatever part of it a process has."""
    penalised = {"ff_l1": 0.01, "support_target": 1.5, "support_rate": 0.1, "truncated_share": 0.5, "truncated_keys": 3}
    config = changed(plain[0], steps=3, **penalised)
    trained(config, tmp_path / "one")
    for parallel in ("fsdp", "cp"):
        run = tmp_path / parallel
        command = ("train", "--config", settings(config, tmp_path), "--out", run, "--parallel", parallel)
        assert nursery.run(2, *command).codes == [0, 0]
        assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=0, abs=TOLERANCE)
        for figure in ("grad_norm", "ff_l1", "support", "support_multiplier"):
            one, two = ([record[figure] for record in metrics(of, "train")] for of in (tmp_path / "one", run))
            assert two == pytest.approx(one, rel=1e-5), figure


def test_a_run_goes_on_in_any_layout(nursery: Nursery, small: Config, alone: Path, tmp_path: Path) -> None:
    """Each layout resumes what each other one has saved, and the end is that of the run in one process.

    Each process has random numbers of its own. That it goes on with these is tried in tests/reliability/layouts.py.
    """
    run, path = tmp_path / "run", settings(small, tmp_path)
    fsdp, ddp, cp, mesh = [("--parallel", word) for word in ("fsdp", "ddp", "cp")] + [("--mesh", "dp=2,cp=2")]
    layouts = [(2, fsdp), (4, ddp), (2, cp), (1, ddp), (4, mesh), (2, fsdp), (1, ddp), (2, cp)]
    for steps, (count, layout) in enumerate(layouts, start=1):
        ended = nursery.run(count, "train", "--config", path, "--out", run, *layout, "--steps", steps)
        assert ended.codes == [0] * count, ended.err
    assert losses(run) == pytest.approx(losses(alone), rel=0, abs=TOLERANCE)
    saved, expected = load(locate(run)), load(locate(alone))
    for part in ("model", "optimizer", "ema"):
        torch.testing.assert_close(getattr(saved, part), getattr(expected, part), rtol=1e-4, atol=1e-6)
    assert not torch.equal(saved.rng["cpu"], saved.rng["rank1.cpu"])


def test_only_the_first_process_reads_a_stream(nursery: Nursery, plain: tuple[Config, Path], tmp_path: Path) -> None:
    """The others have no text, and get its tokens. A run goes on at its place with any number of processes."""
    lines = Path(plain[0].data.source).read_text(encoding="utf-8").splitlines()
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    path, elsewhere = settings(changed(plain[0], steps=3, schedule_steps=3), tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = ("train", "--config", path, "--data", "rows.jsonl", "--streaming")
    for run, layouts in (("one", {3: 1}), ("several", {1: 2, 2: 4, 3: 1})):
        for steps, count in layouts.items():
            only = {rank: {"PWD": str(elsewhere if rank else tmp_path)} for rank in range(count)}
            ended = nursery.run(count, *command, "--out", tmp_path / run, "--steps", steps, only=only)
            assert ended.codes == [0] * count, ended.err
    assert losses(tmp_path / "several") == pytest.approx(losses(tmp_path / "one"), rel=0, abs=TOLERANCE)
    places = [load(locate(tmp_path / run)).state["position"] for run in ("one", "several")]
    assert places[0] == places[1]
    figures = [metrics(tmp_path / run, "train")[-1]["bits_per_byte"] for run in ("one", "several")]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_processes_start_from_the_same_weights(nursery: Nursery, small: Config, alone: Path, tmp_path: Path) -> None:
    """They start from the average of another run as one process does, and then have its losses. One speaks for all."""
    optim = ("--steps", 2, "--set", "optim.schedule_steps=2")
    command = ("train", "--config", settings(small, tmp_path), "--init-from", alone, "--parallel", "fsdp", *optim)
    runs = [tmp_path / "one", tmp_path / "two"]
    for count, run in enumerate(runs, 1):
        ended = nursery.run(count, *command, "--out", run)
        assert ended.codes == [0] * count, ended.err
        assert "starting from the moving average of the weights" in ended.out[0]
        assert not any(ended.out[1:] + ended.err)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=0, abs=TOLERANCE)
    assert losses(runs[0])[1] < losses(alone)[1] - 0.1, "the weights are not those that were trained"
    assert metrics(runs[1], "init") == metrics(runs[0], "init")


def test_a_step_that_is_not_finite_is_refused_by_all(nursery: Nursery, small: Config, tmp_path: Path) -> None:
    """If one process took it, the next sum of gradients would never end."""
    run = tmp_path / "run"
    ended = nursery.run(2, "train", "--config", settings(small, tmp_path), "--out", run, *OVERFLOWING)
    assert ended.codes == [1, 1]
    assert ended.err[0].startswith("error: the loss or its gradient was not finite at step 2")
    assert not ended.err[1]
    assert [record["step"] for record in metrics(run, "refused")] == [2] * small.optim.max_refused


def test_an_error_of_all_processes_is_shown_once(nursery: Nursery, small: Config, tmp_path: Path) -> None:
    ended = nursery.run(2, "train", "--config", settings(small, tmp_path), "--out", tmp_path / "run", "--device", "x")
    assert ended.codes == [2, 2]
    assert ended.err == ["error: unknown device 'x'; use auto, cpu, cuda, or cuda:1\n", ""]


def test_an_error_of_one_process_ends_all(nursery: Nursery, small: Config, tmp_path: Path) -> None:
    """The cache of the second process is a file, which is an error. The first waits for it, and then exits silently."""
    (tmp_path / "file").touch()
    command = ("train", "--config", settings(small, tmp_path), "--out", tmp_path / "run")
    ended = nursery.run(2, *command, only={1: {"CDA_CACHE": str(tmp_path / "file")}})
    assert ended.codes == [2, 2]
    assert not ended.err[0]
    assert ended.err[1].startswith("error: ")
    assert ended.err[1].count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("--config", "settings.yaml", "--out", "{tmp}/run", "--data", "text.txt"), "data "),
        (("--config", "other.yaml", "--out", "{tmp}/run"), "optim.lr is 0.5 here and 0.25 in the first one;"),
        (
            ("--config", "settings.yaml", "--out", "run"),
            "{tmp}/second/run is not the folder into which the first process saves",
        ),
    ],
    ids=["text", "settings", "run folder"],
)
def test_what_differs_on_another_machine_is_refused(
    nursery: Nursery, small: Config, tmp_path: Path, command: tuple[str, ...], says: str
) -> None:
    """Otherwise each process would silently train on its own text, with its own settings, or save where none looks."""
    text = Path(small.data.source).read_text(encoding="utf-8")
    for name, length, rate in (("first", 500, 0.25), ("second", 400, 0.5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "text.txt").write_text(text[:length], encoding="utf-8")
        settings(changed(small, lr=rate), folder).rename(folder / "other.yaml")
        settings(small, folder)
    (tmp_path / "second" / "run").mkdir()  # as another run may have left it
    arguments = [word.format(tmp=tmp_path) for word in command]
    machines = {rank: {"PWD": str(tmp_path / name)} for rank, name in enumerate(("first", "second"))}
    ended = nursery.run(2, "train", *arguments, only=machines)
    assert ended.codes == [2, 2]
    assert not ended.err[0]
    assert says.format(tmp=tmp_path) in ended.err[1]
    assert ended.err[1].count("\n") == 1


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_settings_of_python_and_pytorch_are_restored(small: Config, parallel: str) -> None:
    """What else this Python process does, before or after, must not depend on a run in several processes."""

    def settings_now() -> list[object]:
        return [list(warnings.filters), logging.getLogger("torch").level, torch._dynamo.config.optimize_ddp]

    config = with_settings(small, {"run.parallel": parallel})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    before = settings_now()
    with Processes(Place(rank=1, processes=2), mesh=Mesh.of(config.run, 2)) as processes:
        processes.silence_warnings()
        silent = settings_now()
        wrapped = processes.wrap(Transformer(config.model), config, torch.device("cpu"), torch.float32, compiled=True)
        assert before != silent != settings_now()
    assert settings_now() == before
    assert not getattr(wrapped, "find_unused_parameters", False), "two processes need no search in each step"


def test_the_launcher_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the variables of torchrun's agent stay, nor a thread that could signal whoever has a worker's number."""
    monkeypatch.setattr(sys, "argv", ["cda", "--version"])
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    before, threads = dict(os.environ), threading.enumerate()
    with StopRequest() as stop:
        assert launch(2, stop) == 0
    assert dict(os.environ) == before
    assert not [thread for thread in threading.enumerate() if thread not in threads]


def test_a_batch_that_cannot_be_shared_names_the_remedy(small: Config) -> None:
    config = changed(small, batch_size=3, grad_accum=2)
    assert count_processes(config, Place(), 6, dry_run=False) == 6
    with pytest.raises(ConfigError, match=r"6 sequences \(batch_size 3 × grad_accum 2\), which 4 .* a multiple of 4"):
        count_processes(config, Place(), 4, dry_run=False)


@pytest.mark.parametrize(
    ("changes", "count", "says"),
    [
        ({"run.parallel": "cp"}, 3, "3 processes divide a sequence into 6 equal chunks, and it has 16 tokens; choose "),
        ({"run.mesh": "dp=2,cp=2"}, 2, "there are 2 processes, which --mesh dp=2,cp=2 does not make up; give another "),
        ({"run.mesh": "cp=3"}, 4, "there are 4 processes, which --mesh cp=3 does not make up; give another --mesh, "),
        ({"run.mesh": "cp=2", "optim.grad_accum": 1}, 6, "a step has 2 sequences .* which 3 groups of processes "),
    ],
)
def test_what_a_mesh_cannot_divide_names_the_remedy(
    small: Config, changes: dict[str, object], count: int, says: str
) -> None:
    """One process goes on with any of these runs."""
    config = with_settings(small, changes)
    assert count_processes(config, Place(), 1, dry_run=False) == 1
    with pytest.raises(ConfigError, match=f"^{says}"):
        count_processes(config, Place(), count, dry_run=False)


def test_the_place_comes_from_the_environment() -> None:
    assert Place.of({"RANK": "3", "WORLD_SIZE": "4"}) == Place(), "only torchrun sets all of them"
    environment = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert Place.of(environment) == Place(3, 4, 3, 4, 0)
    environment |= {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
    assert Place.of(environment) == Place(3, 4, 1, 2, 1)


def test_torchrun_decides_the_number_of_processes(small: Config) -> None:
    """`--devices` counts those on this machine, and torchrun those on all machines."""
    two_of_four = Place(0, 4, 0, 2)
    assert count_processes(small, two_of_four, 1, dry_run=False) == 4
    assert count_processes(small, two_of_four, 2, dry_run=False) == 4
    with pytest.raises(ConfigError, match="leave out --devices"):
        count_processes(small, two_of_four, 4, dry_run=False)
