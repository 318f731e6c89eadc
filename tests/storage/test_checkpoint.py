import errno
import math
import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.errors import CheckpointError, StorageError
from cda_cli.storage.checkpoint import (
    check_fits,
    list_steps,
    load,
    locate,
    newest,
    publish,
    step_folder,
    verify,
)
from cda_cli.storage.tensors import read_tensors, write_tensors


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    def facts(tensors: dict[str, Tensor]) -> dict[str, object]:
        # `view` takes no 0-d tensor to bytes, hence the flattening.
        return {
            name: (tensor.shape, tensor.dtype, tensor.contiguous().flatten().view(torch.uint8).tolist())
            for name, tensor in tensors.items()
        }

    return facts(left) == facts(right)


def damage(checkpoint: Path, name: str = "model.safetensors") -> None:
    file = checkpoint / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def hidden(run: Path) -> list[str]:
    return [entry.name for entry in (run / "checkpoints").iterdir() if entry.name.startswith(".")]


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path, contents) -> None:
    given_ = contents(100)
    path = publish(tmp_path, **given_)
    assert path == tmp_path / "checkpoints" / "step-00000100"
    back = load(path)
    for part in ("model", "optimizer", "rng"):
        assert same_bits(getattr(back, part), given_[part]), f"the {part} changed"
    assert (back.path, back.state, back.tokenizer_json) == (path, given_["state"], given_["tokenizer_json"])


_dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 3), max_size=4), st.sampled_from(_dtypes), st.booleans()),
        max_size=5,
    )
)
def test_tensors_of_any_shape_and_dtype_come_back(tmp_path_factory, specs) -> None:
    file = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    tensors = {}
    for name, (shape, dtype, transposed) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
        tensor = raw.view(dtype).reshape(shape) if size else torch.zeros(shape, dtype=dtype)
        tensors[name] = tensor.movedim(0, -1) if transposed and len(shape) > 1 else tensor
    write_tensors(file, tensors)
    assert same_bits(read_tensors(file), tensors)


def test_tensors_that_share_memory_are_saved_each_for_itself(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base, "view": base[1:], "column": base[:, 1], "none": base[:0], "weight": base.t()}
    write_tensors(tmp_path / "model.safetensors", tensors)
    assert same_bits(read_tensors(tmp_path / "model.safetensors"), tensors)


def test_a_name_that_could_not_be_read_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="__metadata__"):
        write_tensors(tmp_path / "model.safetensors", {"__metadata__": torch.ones(1)})


def test_an_average_is_a_part_of_its_own(tmp_path: Path, contents) -> None:
    """Whoever does not ask for it does not read it; whoever asks where there is none gets nothing."""
    average = {"tied.a": torch.randn(7)}
    path = publish(tmp_path, **contents(1), ema=average)
    assert same_bits(load(path).ema, average)
    assert same_bits(load(path, parts=("ema",)).ema, average)
    assert load(publish(tmp_path, **contents(2))).ema == {}
    damage(path, "ema.safetensors")
    assert load(path, parts=("model",)).ema == {}
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is damaged"):
        load(path)


def test_loaded_tensors_outlive_their_file(tmp_path: Path, contents) -> None:
    path = publish(tmp_path, **contents(1, size=100_000))
    back = load(path, parts=("model",))
    # A mapped file that is cut short kills its reader with SIGBUS, so this looks before it reads.
    assert str(path) not in Path("/proc/self/maps").read_text(), "the tensors still lie in the file"
    os.truncate(path / "model.safetensors", 0)
    assert same_bits(back.model, contents(1, size=100_000)["model"])


@settings(max_examples=50)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_of_the_state_come_back_exactly(tmp_path_factory, number: float) -> None:
    path = publish(
        tmp_path_factory.mktemp("run"), step=1, model={}, optimizer={}, rng={}, state={"best": {"loss": number}}
    )
    assert load(path).state["best"]["loss"].hex() == number.hex()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1, 2), {1: 2}, {"a": object()}])
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, contents, value: object) -> None:
    publish(tmp_path, **contents(1))
    with pytest.raises((TypeError, ValueError)):
        publish(tmp_path, **(contents(2) | {"state": {"value": value}}))
    assert list_steps(tmp_path) == [1]
    assert hidden(tmp_path) == []


def test_evaluation_does_not_read_the_optimizer(tmp_path: Path, contents, watch) -> None:
    path = publish(tmp_path, **contents(1))
    opened: list[str] = []
    with watch(lambda event, name: opened.append(Path(name).name)):
        back = load(path, parts=("model",))
    assert "optimizer.safetensors" not in opened
    assert back.optimizer == back.rng == {}
    damage(path, "optimizer.safetensors")
    load(path, parts=("model",))
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged"):
        load(path)
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing"):
        load(path, parts=("model",))
    with pytest.raises(ValueError, match="no part 'mode'"):
        load(path, parts=("mode",))


def test_modes_follow_the_umask(tmp_path: Path, contents) -> None:
    before = os.umask(0o022)
    try:
        path = publish(tmp_path, **contents(1))
    finally:
        os.umask(before)
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.iterdir()}
    assert set(modes.values()) == {0o644}, modes
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_every_file_is_durable_before_the_checkpoint_shows(tmp_path: Path, contents, watch) -> None:
    publish(tmp_path, **contents(1))
    done: list[tuple[str, str]] = []
    with watch(lambda event, path: done.append((event, path))):
        path = publish(tmp_path, **contents(2))
    order = [(event, name) for event, name in done if event in ("fsync", "os.rename")]
    temporary = Path(order[-2][1])
    assert {name for _, name in order[:-3]} == {str(temporary / entry.name) for entry in path.iterdir()}
    assert order[-3:] == [("fsync", str(temporary)), ("os.rename", str(temporary)), ("fsync", str(path.parent))]


def test_only_the_newest_stay_and_unknown_names_are_never_touched(tmp_path: Path, contents) -> None:
    folder = tmp_path / "checkpoints"
    unknown = {"step-100.backup", "step-00000001.old", "best", "step-1", "step-000000001", "step-٠٠٠٠٠٠٠١", ".tmp-mine"}
    for name in unknown:
        (folder / name).mkdir(parents=True)
        (folder / name / "mine").touch()
    (folder / "step-00000000").write_text("a file of the user")
    (folder / "step-00000002").symlink_to(folder / "best")
    for step in (10, 20, 30, 40):
        publish(tmp_path, **contents(step), keep=3)
    assert list_steps(tmp_path) == [20, 30, 40]
    publish(tmp_path, **contents(50), keep=0)
    assert list_steps(tmp_path) == [40, 50], "fewer than two were kept"
    names = {entry.name for entry in folder.iterdir()}
    assert names == unknown | {"step-00000000", "step-00000002", "step-00000040", "step-00000050"}
    assert all((folder / name / "mine").exists() for name in unknown)


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path, contents) -> None:
    for step in (1, 2, 3):
        publish(tmp_path, **contents(step), keep=9)
    damage(step_folder(tmp_path, 3))
    publish(tmp_path, **contents(4))
    assert list_steps(tmp_path) == [2, 3, 4], "2 is the second newest verified one"
    publish(tmp_path, **contents(5))
    assert list_steps(tmp_path) == [4, 5]


def test_one_published_below_the_newest_is_not_pruned_at_once(tmp_path: Path, contents) -> None:
    for step in (10, 20):
        publish(tmp_path, **contents(step))
    assert publish(tmp_path, **contents(5)).is_dir()


def test_a_step_that_exists_stays_if_whole_and_is_replaced_if_damaged(tmp_path: Path, contents) -> None:
    path = publish(tmp_path, **contents(7))
    before = path.stat().st_ino
    assert publish(tmp_path, **contents(7)) == path
    assert path.stat().st_ino == before, "a whole checkpoint was written again"
    damage(path)
    assert publish(tmp_path, **contents(7)) == path
    verify(path)
    assert hidden(tmp_path) == []


def test_the_newest_passes_over_the_damaged_and_names_them(tmp_path: Path, contents) -> None:
    assert newest(tmp_path) == (None, [])
    paths = [publish(tmp_path, **contents(step), keep=9) for step in (1, 2, 3, 4)]
    damage(paths[3])
    (paths[2] / "manifest.json").unlink()
    found, passed_over = newest(tmp_path)
    assert found == paths[1]
    assert [str(path) in sentence for path, sentence in zip((paths[3], paths[2]), passed_over, strict=True)] == [
        True
    ] * 2
    assert "model.safetensors is damaged" in passed_over[0]
    assert "manifest.json is missing" in passed_over[1]


def test_a_run_a_checkpoint_and_the_folder_between_are_all_located(tmp_path: Path, contents, monkeypatch) -> None:
    paths = [publish(tmp_path, **contents(step)) for step in (1, 2)]
    copy = paths[0].rename(tmp_path / "best")
    assert locate(tmp_path) == locate(tmp_path / "checkpoints") == locate(paths[1]) == paths[1]
    assert locate(copy) == copy
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert locate(Path()).name == "step-00000002"


def test_what_is_passed_over_is_told(tmp_path: Path, contents, caplog) -> None:
    paths = [publish(tmp_path, **contents(step)) for step in (1, 2)]
    damage(paths[1])
    told: list[str] = []
    assert locate(tmp_path, told.append) == paths[0]
    assert len(told) == 1
    assert locate(tmp_path) == paths[0]
    assert told[0] in caplog.text, "without a listener the sentence is lost"
    damage(paths[0])
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole: .*00000002.*; copy the run afresh$"):
        locate(tmp_path)


def test_a_wrong_path_is_one_sentence_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, says in {
        tmp_path / "absent": "does not exist; give a run's folder",
        tmp_path / "file": "is a file; give the folder",
        tmp_path: "is not a run .* give the folder",
        tmp_path / "run": "has no checkpoint yet; train",
        tmp_path / "run" / "checkpoints": "has no checkpoint yet; train",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            locate(path)


def test_a_configuration_that_does_not_fit_is_named() -> None:
    tensors = {"a": torch.zeros(2, 0), "b": torch.zeros(3)}
    expected = {"a": ((2, 0), torch.float32), "b": ((3,), torch.float32)}
    check_fits(tensors, expected)
    for changed, says in [
        (expected | {"c": ((1,), torch.float32)}, "it has no c"),
        (expected | {"b": ((4,), torch.float32)}, r"b has shape \(3,\) in it and \(4,\) in the configuration"),
        (expected | {"b": ((3,), torch.bfloat16)}, "b is float32 in it and bfloat16 in the configuration"),
        ({"a": expected["a"]}, "it has b, which the configuration does not know"),
    ]:
        with pytest.raises(CheckpointError, match=f"does not fit the checkpoint: {says}"):
            check_fits(tensors, changed)


def test_every_failing_operation_leaves_whole_checkpoints(tmp_path: Path, contents, watch) -> None:
    """Each file operation of a save that also prunes is made to fail in turn, from the first to the last."""
    failures = 0
    for failing in range(1000):
        run = tmp_path / str(failing)
        for step in (1, 2):
            publish(run, **contents(step))
        calls = iter(range(1000))

        def fail(event: str, name: str, calls=calls, failing=failing) -> None:
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        try:
            with watch(fail):
                publish(run, **contents(3))
        except StorageError:
            failures += 1
            assert newest(run)[0] in (step_folder(run, 2), step_folder(run, 3))
        else:
            assert newest(run)[0] == step_folder(run, 3)
        assert newest(run)[1] == [], f"operation {failing} left a damaged checkpoint"
        if next(calls) <= failing:
            break
    assert failures > 20, "too few operations were made to fail for this test to mean anything"


def test_a_size_limit_anywhere_in_a_file_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    def save(step: int, size: int) -> None:
        part = {"w": torch.full((size,), float(step))}
        publish(tmp_path, step=step, model=part, optimizer=part, rng={}, state={})

    save(1, 10)
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, 40_000, 1500):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(StorageError, match="step-00000002") as caught:
                save(2, 10_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        assert "what was saved earlier is whole" in str(caught.value)
        assert "ulimit -f" in str(caught.value)
        assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
        assert newest(tmp_path) == (step_folder(tmp_path, 1), [])
    save(2, 10_000)
    assert list_steps(tmp_path) == [1, 2]
