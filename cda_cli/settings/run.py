"""The settings of a run: where it computes, and what it writes."""

# Annotations are evaluated here: pydantic before 2.10 would look for their names in the module of the subclass.

from typing import Annotated, Literal

from cda_cli.settings.setting import Setting, Table

MOST_THREADS = 4096

Dtype = Literal["auto", "float32", "bfloat16"]


class RunSettings(Table):
    """The run itself: none of this changes what the model is."""

    seed: Annotated[
        int,
        Setting("Seed of the weights, the order of the data, dropout and samples.", flag="--seed", ge=0, lt=2**63),
    ] = 0
    init_from: Annotated[
        str | None,
        Setting(
            "A run or checkpoint whose weights a new run starts from, with its model settings and its tokenizer; null: "
            "random weights.",
            flag="--init-from",
            flag_help="A run or checkpoint whose weights, model settings and tokenizer a new run starts from.",
        ),
    ] = None
    init_ema: Annotated[
        bool, Setting("Start from the moving average of those weights, where their checkpoint has one.")
    ] = True
    fork: Annotated[
        bool,
        Setting(
            "Also take over the step, the optimizer, the random numbers and the place in the data of init_from: the "
            "run goes on from there with its own settings."
        ),
    ] = False
    device: Annotated[str, Setting("Device: auto, cpu, cuda, cuda:1 …", flag="--device")] = "auto"
    dtype: Annotated[Dtype, Setting("Precision of the matrix products.", flag="--dtype")] = "auto"
    threads: Annotated[
        int | None,
        Setting("CPU threads of a process; null: as many as the run began with.", ge=1, le=MOST_THREADS),
    ] = None
    compile: Annotated[
        bool | None, Setting("Use torch.compile; by default on a GPU only.", flag="--compile/--no-compile")
    ] = None
    cuda_graphs: Annotated[
        bool | None,
        Setting("Launch forward and backward of a batch as one CUDA graph; null: where that is possible."),
    ] = None
    deterministic: Annotated[
        bool, Setting("Use PyTorch's deterministic algorithms: the same bits each time on one kind of GPU.")
    ] = False
    activation_checkpointing: Annotated[
        bool, Setting("Keep only each block's input for the backward and compute the rest again.")
    ] = False
    parallel: Annotated[
        Literal["ddp", "fsdp", "cp"],
        Setting(
            "What several processes divide: the sequences of a step (ddp), these and the weights (fsdp), or each "
            "sequence (cp).",
            flag="--parallel",
        ),
    ] = "ddp"
    mesh: Annotated[
        str | None,
        Setting(
            "A mesh of processes in place of that, such as dp=2,cp=2: groups of cp processes divide each sequence, and "
            "all of them the weights; null: none.",
            flag="--mesh",
            flag_help="A mesh of processes, such as dp=2,cp=2: cp of them divide each sequence, and all the weights.",
        ),
    ] = None
    backend: Annotated[
        Literal["auto", "torch", "triton", "colt5"], Setting("Backend of the operator.", flag="--backend")
    ] = "auto"
    log_every: Annotated[int, Setting("Steps between two log lines.", ge=1)] = 10
    eval_every: Annotated[
        int,
        Setting("Steps between two validations; 0: only at the end.", flag="--eval-every", by_preset=True, ge=0),
    ] = 250
    eval_batches: Annotated[int, Setting("Batches of a validation during training.", ge=1)] = 20
    save_every: Annotated[
        int,
        Setting("Steps between two checkpoints; 0: only at the end.", flag="--save-every", by_preset=True, ge=0),
    ] = 250
    save_minutes: Annotated[float, Setting("Minutes between two checkpoints, besides save_every; 0: none.", ge=0)] = 0.0
    track: Annotated[
        list[Literal["tensorboard", "wandb", "trackio"]],
        Setting("Trackers besides metrics.jsonl, with commas between.", flag="--track"),
    ] = []  # noqa: RUF012 - pydantic gives each configuration a list of its own
    sample_every: Annotated[
        int, Setting("Steps between two samples of text; 0: none.", flag="--sample-every", by_preset=True, ge=0)
    ] = 0
    sample_tokens: Annotated[int, Setting("Tokens of a sample of text.", ge=1)] = 200
    keep: Annotated[int, Setting("Number of newest checkpoints to keep.", ge=2)] = 2
    keep_best: Annotated[
        bool,
        Setting("Also keep the checkpoint of the lowest validation loss, of those saved at a validated step."),
    ] = True
    patience: Annotated[
        int, Setting("Validations in a row without a new lowest loss after which the run ends; 0: never.", ge=0)
    ] = 0
    process_timeout: Annotated[
        float,
        Setting("Minutes that processes wait for one of them, before they name it and the run ends.", gt=0),
    ] = 30.0
