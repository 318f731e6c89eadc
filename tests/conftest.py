"""What every test shares."""

import gc
import importlib.util
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

# The tensors of the tests are small: a second thread only waits for the first, and starves whatever else runs.
# Set before torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `cda` sets it, for those that start with more threads
# As `run.deterministic` sets it. Here other tests use cuBLAS first, which then reads it for the whole process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Inductor would compile a program for each set of vector instructions of the processor, to see that the compiler knows
# them: 6 CPU seconds in an empty cache, which the kernels that it compiles next show as well.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# Under nohup this process ignores SIGHUP, and so would every process that it starts: the tests of a hang-up would wait
# for ever. New processes do not inherit a handler that does nothing, and with it this one still outlives its terminal.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

# Without a GPU the kernels run in Triton's interpreter, which is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A slow machine is no failure. (The first input of a process alone takes hypothesis a second or two to set up.)
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# These files start processes, train, import transformers, or run kernels in the interpreter: most of the time of all.
# Elsewhere single tests have the marker, such as those that compile.
SLOW = (
    "causal/test_cuts.py",
    "commands/test_causal_checks.py",
    "commands/test_compare_command.py",
    "commands/test_data_identity.py",
    "commands/test_devices.py",
    "commands/test_disk_full.py",
    "commands/test_doctor_command.py",
    "commands/test_eval_command.py",
    "commands/test_eval_losses.py",
    "commands/test_eval_windows.py",
    "commands/test_evidence.py",
    "commands/test_export_command.py",
    "commands/test_figures.py",
    "commands/test_import_command.py",
    "commands/test_init_from.py",
    "commands/test_inspect_page.py",
    "commands/test_inspect_sparsity_command.py",
    "commands/test_interrupts.py",
    "commands/test_non_finite.py",
    "commands/test_resume_command.py",
    "commands/test_sample_batches.py",
    "commands/test_sample_command.py",
    "commands/test_streams.py",
    "commands/test_sweep_command.py",
    "commands/test_sweep_plan.py",
    "commands/test_sweep_tables.py",
    "commands/test_train_data_command.py",
    "commands/test_which_weights.py",
    "data/test_prepare.py",
    "data/test_streaming.py",
    "evaluation/test_details.py",
    "evaluation/test_harness_tasks.py",
    "evaluation/test_intervals.py",
    "evaluation/test_loglikelihood.py",
    "generation/test_generation.py",
    "generation/test_generation_batches.py",
    "interchange/test_export_families.py",
    "interchange/test_export_published.py",
    "interchange/test_hf.py",
    "interchange/test_hf_tokenizer.py",
    "interchange/test_import_families.py",
    "interchange/test_import_gguf.py",
    "interchange/test_import_refusals.py",
    "interchange/test_own_folder.py",
    "interchange/test_published_file.py",
    "interchange/test_smollm2.py",
    "model/test_active_units.py",
    "model/test_left_padding.py",
    "model/test_length_generalisation.py",
    "model/test_model_families.py",
    "model/test_model_heads.py",
    "model/test_model_settings.py",
    "ops/test_attention_blocks.py",
    "ops/test_backends.py",
    "ops/test_compiled_kernels.py",
    "ops/test_decoding.py",
    "ops/test_fused_attention.py",
    "ops/test_fused_attention_variants.py",
    "ops/test_largest_entries.py",
    "ops/test_transforms.py",
    "ops/test_triton_rows.py",
    "ops/test_vector_functions.py",
    "page/test_in_chromium.py",
    "reliability/test_reliability.py",
    "storage/test_checkpoint.py",
    "storage/test_checkpoint_damage.py",
    "storage/test_optimizer_state.py",
    "test_architecture_diagram.py",
    "test_notebook.py",
    "test_observed_transformers.py",
    "test_runtime.py",
    "test_transformers.py",
    "test_transformers_settings.py",
    "training/test_auxiliary_losses.py",
    "training/test_bit_identical_resume.py",
    "training/test_distribution.py",
    "training/test_flops.py",
    "training/test_loop.py",
    "training/test_memory_forecast.py",
    "training/test_nonfinite.py",
    "training/test_schedule_and_early_stop.py",
    "training/test_trackers.py",
)

FENCE, MARK = 64, 12345.0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Reads no SLOW file where only quick tests are asked for: to import transformers alone takes seconds."""
    quick = config.option.markexpr == "not slow"
    return True if quick and collection_path.relative_to(Path(__file__).parent).as_posix() in SLOW else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Looks for no garbage while the files of tests are imported.

    They make half a million objects and hardly any garbage, and each worker would spend a quarter of the time on it.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of the SLOW files, and those that run a kernel."""
    here = Path(__file__).parent
    missing = [name for name in SLOW if not (here / name).is_file()]
    assert not missing, f"no such files of tests: {missing}"
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if item.path.relative_to(here).as_posix() in SLOW or any(value == "triton" for value in parameters):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Spares the tests what the imports have left, and adapts Triton's interpreter, if it is to run the kernels.

    Each training looks for garbage once, among all objects. Those of the imports, some half a million, would take it
    longer than its steps.
    """
    gc.collect()
    gc.freeze()
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from tests.interpreter import end_small_numbers, spare_repetitions

        end_small_numbers()
        spare_repetitions()


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every new tensor lies inside a larger one, poisoned; the borders must stand at the end."""
    made: list[Tensor] = []

    def new_empty(self: Tensor, *shape: object, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        sizes = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        whole = torch.full((sizes.numel() + 2 * FENCE,), MARK, device=self.device, dtype=dtype or self.dtype)
        whole[FENCE : FENCE + sizes.numel()] = torch.nan if whole.is_floating_point() else -(2**30)
        made.append(whole)
        return whole[FENCE : FENCE + sizes.numel()].view(sizes)

    def new_empty_strided(self: Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        last = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        return new_empty(self, last + 1).as_strided(size, stride)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", new_empty_strided)
    yield made
    for whole in made:
        mark = torch.full((FENCE,), MARK, dtype=whole.dtype)
        assert torch.equal(whole[:FENCE].cpu(), mark), "something was written before the start"
        assert torch.equal(whole[-FENCE:].cpu(), mark), "something was written past the end"
