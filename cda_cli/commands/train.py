"""`cda train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Option

RUN, MODEL, DATA, OPTIM = "Run", "Model", "Data", "Optimisation"

# The configuration reads the numbers among its flags, as it reads those of --set: 1e3 steps are a thousand.


def train(
    preset: Annotated[
        str | None, Option(help="Named starting point: tiny, small, base, seed …", rich_help_panel=RUN)
    ] = None,
    config: Annotated[
        Path | None, Option(help="YAML with the sections model, data, optim, run.", rich_help_panel=RUN)
    ] = None,
    set_: Annotated[
        list[str] | None, Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting.", rich_help_panel=RUN)
    ] = None,
    out: Annotated[Path | None, Option(help="Run folder; runs/PRESET by default.", rich_help_panel=RUN)] = None,
    resume: Annotated[
        str, Option(metavar="auto|never|CHECKPOINT", help="What to go on from.", rich_help_panel=RUN)
    ] = "auto",
    dry_run: Annotated[
        bool, Option("--dry-run", help="Build all, forecast memory, try a batch, print the plan.", rich_help_panel=RUN)
    ] = False,
    devices: Annotated[int, Option(min=1, help="Processes to start here, a GPU each.", rich_help_panel=RUN)] = 1,
    parallel: Annotated[str | None, Option(help="Of several processes: ddp or fsdp.", rich_help_panel=RUN)] = None,
    seed: Annotated[str | None, Option(metavar="INTEGER", rich_help_panel=RUN)] = None,
    device: Annotated[str | None, Option(help="auto, cpu, cuda, cuda:1 …", rich_help_panel=RUN)] = None,
    dtype: Annotated[str | None, Option(help="auto, float32 or bfloat16.", rich_help_panel=RUN)] = None,
    compile_: Annotated[
        bool | None, Option("--compile/--no-compile", help="torch.compile; on a GPU by default.", rich_help_panel=RUN)
    ] = None,
    backend: Annotated[
        str | None, Option(help="Backend of the operator: auto, torch, triton or colt5.", rich_help_panel=RUN)
    ] = None,
    eval_every: Annotated[
        str | None, Option(metavar="INTEGER", help="Steps between validations.", rich_help_panel=RUN)
    ] = None,
    save_every: Annotated[
        str | None, Option(metavar="INTEGER", help="Steps between checkpoints.", rich_help_panel=RUN)
    ] = None,
    sample_every: Annotated[
        str | None, Option(metavar="INTEGER", help="Steps between samples of text.", rich_help_panel=RUN)
    ] = None,
    track: Annotated[
        str | None, Option(help="Also to tensorboard, wandb or trackio, with commas between.", rich_help_panel=RUN)
    ] = None,
    data: Annotated[
        str | None,
        Option(
            help="stdlib (the default), a path or glob (.txt .jsonl .json .csv .parquet, also packed: .gz "
            ".bz2 .xz .zst .lz4), or hf:OWNER/NAME[:CONFIG].",
            rich_help_panel=DATA,
        ),
    ] = None,
    data_split: Annotated[str | None, Option(help="Split of a hf: dataset.", rich_help_panel=DATA)] = None,
    text_column: Annotated[str | None, Option(help="Column that holds the text.", rich_help_panel=DATA)] = None,
    encoding: Annotated[str | None, Option(help="Of local files: utf-8, utf-16 …", rich_help_panel=DATA)] = None,
    streaming: Annotated[
        bool | None, Option("--streaming/--no-streaming", help="Tokenise while training.", rich_help_panel=DATA)
    ] = None,
    tokenizer: Annotated[str | None, Option(help="bytes, a tokenizer.json, or a hub id.", rich_help_panel=DATA)] = None,
    steps: Annotated[str | None, Option(metavar="INTEGER", help="Optimizer steps.", rich_help_panel=OPTIM)] = None,
    batch_size: Annotated[
        str | None, Option(metavar="INTEGER", help="Sequences a forward pass.", rich_help_panel=OPTIM)
    ] = None,
    grad_accum: Annotated[
        str | None, Option(metavar="INTEGER", help="Forward passes a step.", rich_help_panel=OPTIM)
    ] = None,
    lr: Annotated[str | None, Option(metavar="FLOAT", help="Peak learning rate.", rich_help_panel=OPTIM)] = None,
    seq_len: Annotated[str | None, Option(metavar="INTEGER", help="Context, tokens.", rich_help_panel=MODEL)] = None,
    attention: Annotated[str | None, Option(help="softmax or coordinate-descent.", rich_help_panel=MODEL)] = None,
    attn_k: Annotated[
        str | None, Option(metavar="FLOAT", help="Keys a head may attend to fully.", rich_help_panel=MODEL)
    ] = None,
    learned_k: Annotated[
        bool | None, Option("--learned-k/--fixed-k", help="k per query and head, up to attn-k.", rich_help_panel=MODEL)
    ] = None,
    ff: Annotated[str | None, Option(help="gelu or coordinate-descent.", rich_help_panel=MODEL)] = None,
    ff_k: Annotated[
        str | None, Option(metavar="FLOAT", help="Budget k of the feed-forward.", rich_help_panel=MODEL)
    ] = None,
    eps: Annotated[
        str | None, Option(metavar="FLOAT", help="Temperature ε, of attention and feed-forward.", rich_help_panel=MODEL)
    ] = None,
    solver: Annotated[str | None, Option(help="exact or iterative.", rich_help_panel=MODEL)] = None,
) -> None:
    """Train a model; the same command again goes on from its newest checkpoint.

    Settings: preset, then --config, then --set, then flags, the later winning; so does the later of two --set. Each
    key is described in docs/configuration.md.
    """
    from cda_cli.config import DEFAULT_PRESET, resolve, settings_of
    from cda_cli.signals import StopRequest
    from cda_cli.training.launch import OneVoice, count_processes, launch

    flags = {
        **{f"model.{name}": value for name, value in {
            "seq_len": seq_len, "attention": attention, "attn_k": attn_k, "learned_k": learned_k, "ff": ff,
            "ff_k": ff_k, "attn_eps": eps, "ff_eps": eps, "solver": solver,
        }.items()},
        **{f"data.{name}": value for name, value in {
            "source": data, "split": data_split, "text_column": text_column, "encoding": encoding,
            "streaming": streaming, "tokenizer": tokenizer,
        }.items()},
        **{f"optim.{name}": value for name, value in {
            "steps": steps, "batch_size": batch_size, "grad_accum": grad_accum, "lr": lr,
        }.items()},
        **{f"run.{name}": value for name, value in {
            "seed": seed, "device": device, "dtype": dtype, "compile": compile_, "backend": backend, "track": track,
            "parallel": parallel, "eval_every": eval_every, "save_every": save_every, "sample_every": sample_every,
        }.items()},
    }  # fmt: skip
    run = out or Path("runs") / (preset or (config.stem if config else DEFAULT_PRESET))
    with OneVoice() as voice, StopRequest() as stop:  # a wrong setting is said before torch is imported
        settings = resolve(preset, config, set_ or (), flags, base=settings_of(run, resume))
        if (processes := count_processes(settings, voice.place, devices, dry_run)) > voice.place.processes:
            sys.exit(launch(processes, stop))
        from cda_cli.console import TrainingDisplay, show_dry_run, show_forecast
        from cda_cli.training import run as training
        from cda_cli.training.distribution import Silence, join

        with join(voice, settings) as joined:
            display = TrainingDisplay() if joined.first else Silence()
            if dry_run:
                show_dry_run(training.dry_run(settings, run, resume, display, stop, show_forecast))
            else:
                training.run_training(settings, run, resume, display, stop, joined)
