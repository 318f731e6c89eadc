"""Reruns the experiments of benchmarks/evidence/: each file is a sweep (docs/sweeps.md), and says what it asks.

    python benchmarks/evidence.py                             # all: full on a GPU, and in the reduced form on a CPU
    python benchmarks/evidence.py language-modelling --text shakespeare.txt --jobs 2
    python benchmarks/evidence.py length-sort --full --devices cuda:0,cuda:1

The page of a sweep, OUT/NAME.md, has its tables with date, machine, versions, commit, command, seeds and hours, as
benchmarks/results/ wants it, and OUT/NAME/ its runs, where NAME also has the text and the reduced form. The same
command goes on where it was stopped. Sweeps that model a language take the Python source of the installed packages, or
in the reduced form that of the standard library, and each text that `--text` names. Other options go to `cda sweep`;
write those behind the names of sweeps. What `cda sweep` refuses ends all, with exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from cda_cli.signals import StopRequest
from cda_cli.storage import write_file
from cda_cli.sweep.files import read_spec

FILES = {file.stem: file for file in sorted(Path(__file__).with_name("evidence").glob("*.yaml"))}
WRONG_USAGE = 2  # the exit code of `cda sweep` for a command or a file that it refuses
JOBS_OF_A_GPU = 4  # which spend half of their time on starting and compiling


def installed_source(file: Path, stop: StopRequest) -> Path:
    """Writes the Python files of the installed packages, those that are UTF-8, into `file`, each as a line of JSON.

    Each run looks at all files of its text, and tens of thousands of them take seconds. A `file` that is there stays,
    since runs that have begun have it.
    """
    if not file.exists():
        lines = []
        for source in stop.until(sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))):
            with contextlib.suppress(UnicodeDecodeError):
                lines.append(json.dumps({"text": source.read_text(encoding="utf-8")}) + "\n")
        if not stop:
            write_file(file, "".join(lines).encode())
    return file


def takes_text(name: str) -> bool:
    """Whether a sweep models the texts that it is given, and not one that its file names."""
    return "source" not in read_spec(FILES[name]).data


def version_of(page: Path) -> tuple[int, int] | None:
    """What differs once a page has been written again; None where there is none."""
    return (page.stat().st_ino, page.stat().st_mtime_ns) if page.exists() else None


def run(command: Sequence[object], stop: StopRequest) -> int:
    """Runs a command, passes a request to stop on to it, and returns its exit code."""
    # A Ctrl-C of the terminal reaches this process alone, which does not end before the sweep has saved.
    process = subprocess.Popen(list(map(str, command)), start_new_session=True)
    # Not SIGINT, to which a process that is still importing answers with a traceback.
    stop.answer = process.terminate
    if stop:  # It may have come before there was a process to pass it on to.
        process.terminate()
    return process.wait()


def run_all(asked: argparse.Namespace, passed_on: Sequence[str], stop: StopRequest) -> list[str]:
    """Runs the sweeps one after the other, until a stop is asked for. Returns those in which something failed.

    Exits with WRONG_USAGE where `cda sweep` does, which has said why.
    """
    asked.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    failed: list[str] = []
    for name in asked.names or FILES:
        file = os.path.relpath(FILES[name])  # so that the page names it as a person would
        sources: list[str | Path | None] = [None]
        if takes_text(name):
            sources = [
                installed_source(asked.out / "python-source.jsonl", stop) if asked.full else "stdlib",
                *asked.text,
            ]
        for source in sources:
            words = [name, *([Path(source).stem] if source else []), *([] if asked.full else ["reduced"])]
            out = asked.out / "-".join(words)
            page = Path(f"{out}.md")
            command = [sys.executable, "-m", "cda_cli", "sweep", file, "--out", out, "--jobs", asked.jobs, *passed_on]
            command += [] if asked.full else ["--reduced"]
            command += ["--set", f"data.source={source}"] if source else []
            command += ["--markdown", page]
            command += ["--plot", f"{out}.svg"] if importlib.util.find_spec("matplotlib") else []
            if stop:
                return failed
            before = version_of(page)
            code = run(command, stop)
            if stop:
                return failed
            if code == WRONG_USAGE:
                sys.exit(code)
            failed += [out.name] * bool(code)
            if version_of(page) != before:
                print(f"{page}, after {(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr, flush=True)
    return failed


def main() -> None:
    with StopRequest() as stop:
        failed = run_all(*read_arguments(), stop)
    if stop.signal_number:
        sys.exit(128 + stop.signal_number)
    if failed:
        sys.exit(f"something failed in {', '.join(failed)}; the same command tries it again")


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """What was asked for, and the options that are those of `cda sweep`."""
    # Importing PyTorch takes seconds, in which a Ctrl-C is heard.
    import torch

    from cda_cli.data import is_there

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FILES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs") / "evidence", help="folder of runs and pages")
    parser.add_argument("--text", action="append", default=[], help="a text to model, besides Python source")
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--full", action=argparse.BooleanOptionalAction, default=has_gpu, help="by default on a GPU")
    jobs = JOBS_OF_A_GPU if has_gpu else os.cpu_count()
    parser.add_argument("--jobs", type=int, default=jobs, help=f"runs at once; here {jobs} by default")
    asked, passed_on = parser.parse_known_args()
    if unknown := set(asked.names) - set(FILES):
        # A name before which an option of `cda sweep` stands may be the value of that option.
        parser.error(f"there is no sweep {', '.join(sorted(unknown))}; name some of {', '.join(FILES)}, before options")
    for text in asked.text:
        if not is_there(text):
            parser.error(f"there is no text {text}; name one that is there")
    if asked.text and not any(map(takes_text, asked.names or FILES)):
        others = ", ".join(filter(takes_text, FILES))
        parser.error(f"--text changes nothing in {', '.join(asked.names)}; leave it out, or name some of {others}")
    return asked, passed_on


if __name__ == "__main__":
    main()
