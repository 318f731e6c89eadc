"""The diagnosis: versions, devices, backends, and checks that would notice a wrong operator."""

from __future__ import annotations

import importlib.metadata
import math

import pytest
import torch

from cda_cli.diagnosis import Check, Diagnosis, diagnose


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return diagnose()


def test_versions_are_those_installed(diagnosis: Diagnosis) -> None:
    for package in ("torch", "numpy" if "numpy" in diagnosis.versions else "einops", "datasets"):
        assert diagnosis.versions[package] == importlib.metadata.version(package)
    assert diagnosis.versions["python"].count(".") == 2


def test_every_device_is_checked(diagnosis: Diagnosis) -> None:
    """A GPU that nobody checked could select wrongly unnoticed."""
    assert len(diagnosis.devices) == 1 + torch.cuda.device_count()
    assert diagnosis.devices[0].startswith("cpu (")
    prefixes = {check.name.split(": ")[0] for check in diagnosis.checks}
    assert prefixes == {"cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))}


def test_weights_and_both_gradients_and_attention_are_checked(diagnosis: Diagnosis) -> None:
    names = [check.name for check in diagnosis.checks if check.name.startswith("cpu")]
    assert len(names) == len(set(names)) == 11
    for words in ("weights", "∂s", "∂k", "attention, float32", "attention, bfloat16", "ε = 0.01", "k = 128"):
        assert any(words in name for name in names), words


def test_all_hold_here_and_none_by_a_limit_that_says_nothing(diagnosis: Diagnosis) -> None:
    """A tolerance as large as the quantity would pass a wrong operator too. The largest is that of bf16 on a GPU: two
    roundings of outputs of up to 5."""
    for check in diagnosis.checks:
        assert check.passed, f"{check.name}: {check.error} > {check.tolerance}"
        assert math.isfinite(check.error)
        assert 0 < check.tolerance < 2 * 2**-8 * 5


@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (1.0, True), (1.1, False), (math.nan, False)])
def test_what_passes(error: float, passed: bool) -> None:
    """An error that is no number is a failure."""
    assert Check("x", error, 1.0).passed is passed


def test_both_solvers_have_a_backend_with_its_reason(diagnosis: Diagnosis) -> None:
    assert {"cpu, exact", "cpu, iterative"} <= set(diagnosis.backends)
    assert len(diagnosis.backends) == 2 * (1 + torch.cuda.device_count())
    for name, words in diagnosis.backends.items():
        assert words.startswith("torch (" if name.startswith("cpu") else ("torch (", "triton ("))


def test_the_dict_is_plain(diagnosis: Diagnosis) -> None:
    plain = diagnosis.as_dict()
    assert set(plain) == {"versions", "devices", "backends", "cache", "checks"}
    assert plain["checks"][0] == diagnosis.checks[0]._asdict() | {"passed": True}
