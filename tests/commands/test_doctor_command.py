"""`cda doctor`, and a machine without Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.commands.helpers import Cda, environment

# One interpreter does all five, since PyTorch takes seconds to import. Its imports find no triton.
WITHOUT_TRITON = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTriton())
from cda_cli.main import run
def cda(*arguments):
    sys.argv = ["cda", *arguments]
    try:
        run()
    except SystemExit as leaving:
        print(f"exit code {leaving.code or 0} of {arguments[0]}", flush=True)
config, out = sys.argv[1:]
cda("doctor")
cda("train", "--config", config, "--out", out, "--steps", "1", "--solver", "iterative", "--backend", "colt5")
cda("eval", out, "--backend", "colt5", "--max-batches", "1")
cda("eval", out, "--max-batches", "1")
cda("sample", out, "--backend", "triton", "--prompt", "def ")
"""


def test_all_is_well_here(cda: Cda) -> None:
    result = cda("doctor")
    assert (result.code, result.err) == (0, "")
    for words in ("Versions", "torch", "Devices", "cpu (", "Backend of each solver", "float64 optimum", "ok"):
        assert words in result.out
    assert "FAILED" not in result.out


def test_the_cache_is_named_with_what_it_holds(cda: Cda, cache: Path) -> None:
    """Whoever runs out of space on a disk looks for it."""
    (cache / "tokens" / "key").mkdir(parents=True)
    (cache / "tokens" / "key" / "train.bin").write_bytes(bytes(3 * 2**20))
    words = " ".join(cda("doctor").out.split())
    assert f"folder {cache} (the environment variable CDA_CACHE names another)" in words
    assert "size 3 MiB (remove the folder to empty the cache)" in words


def test_json_is_all_of_stdout(cda: Cda, cache: Path) -> None:
    result = cda("doctor", "--json")
    assert (result.code, result.err) == (0, "")
    document, end = json.JSONDecoder().raw_decode(result.out)
    assert result.out[end:] == "\n"
    assert set(document) == {"versions", "devices", "backends", "cache", "checks"}
    assert document["cache"] == {"folder": str(cache), "size": 0}
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    assert set(document["backends"]) == {f"{one}, {solver}" for one in devices for solver in ("exact", "iterative")}
    assert len(document["checks"]) == 11 * len(devices)
    for check in document["checks"]:
        assert set(check) == {"name", "error", "tolerance", "passed"}
        assert check["passed"]


def test_triton_may_be_absent_on_a_cpu(tiny: Path, tmp_path: Path) -> None:
    """As where no GPU is: everything works but what asks for the kernels, which is refused in one sentence."""
    command = [sys.executable, "-c", WITHOUT_TRITON, str(tiny), str(tmp_path / "run")]
    path = environment(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
    for name, times in (("doctor", 1), ("train", 1), ("eval", 2)):
        assert done.stdout.count(f"exit code 0 of {name}\n") == times, f"{done.stdout}{done.stderr}"
    assert "colt5, iterative solver" in done.stdout
    assert "exit code 2 of sample" in done.stdout
    sentence = "error: backend 'triton' cannot run: the package triton is not installed; choose backend 'torch'\n"
    assert done.stderr == sentence
