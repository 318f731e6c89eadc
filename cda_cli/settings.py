"""The settings: the type, default, limits, meaning and flag of each setting stand here, and nowhere else.

`config` makes the validated configuration from them. `settings_table` makes the table of them, from which `commands`
makes the flags with their help and their completion, and `docs/generate.py` the pages. Every `cda --help` reads this
file, so it imports no pydantic.
"""

# Annotations are evaluated here: pydantic before 2.10 would look for their names in the module of the subclass.

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

if TYPE_CHECKING:
    from pydantic import BaseModel as Table  # tells a type checker which arguments a section of the configuration takes
else:
    Table = object

PRESET_FOLDER = Path(__file__).parent / "presets"
DEFAULT_PRESET = "tiny"
MOST_THREADS = 4096

Dtype = Literal["auto", "float32", "bfloat16"]
Side = Literal["validation", "train", "all"]  # of a text
Activation = Literal[
    "gelu", "gelu-tanh", "coordinate-descent", "coordinate-descent-linear", "coordinate-descent-relu2",
    "coordinate-descent-glu", "relu2", "hard-topk", "swiglu", "reglu", "blocks", "hard-topk-blocks",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What the table says of a setting besides its type and its default.

    `flag` is its option of `cda train`, such as "--attn-k", or "--compile/--no-compile" for a switch, and `short` the
    same in one letter. Two settings may share a flag, which then sets both; the first of them describes it, with
    `flag_help`. `by_preset` says that the presets differ in a setting that has a flag.
    """

    help: str
    flag: str = ""
    short: str = ""
    flag_help: str = ""
    by_preset: bool = False
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    @property
    def parameter(self) -> str:
        """The name of the parameter that holds the value of the flag."""
        return self.flag.partition("/")[0].removeprefix("--").replace("-", "_")

    # pydantic reads the limits by the protocol of annotated_types.GroupedMetadata.
    __is_annotated_types_grouped_metadata__: ClassVar[Literal[True]] = True

    def __iter__(self) -> Iterator[object]:
        from pydantic import Field

        return iter(Field(gt=self.gt, ge=self.ge, lt=self.lt, le=self.le).metadata)


class ModelSettings(Table):
    """The decoder-only Transformer."""

    vocab_size: Annotated[int, Setting("Number of tokens; set from the tokenizer.", ge=2)] = 256
    seq_len: Annotated[int, Setting("Context length in tokens.", flag="--seq-len", by_preset=True, ge=2)] = 256
    dim: Annotated[int, Setting("Width of the residual stream.", ge=1)] = 128
    depth: Annotated[int, Setting("Number of blocks.", ge=1)] = 4
    heads: Annotated[int, Setting("Number of attention heads.", ge=1)] = 4
    kv_heads: Annotated[
        int | None,
        Setting(
            "Key and value heads, each for heads / kv_heads neighbouring query heads; null: as many as heads.",
            ge=1,
        ),
    ] = None
    dim_head: Annotated[int | None, Setting("Width of a head; null: dim / heads.", ge=1)] = None
    attn_bias: Annotated[
        Literal["none", "qkv", "all"],
        Setting("Biases of attention: none, those of queries, keys and values (qkv), or of the output too (all)."),
    ] = "none"
    ff_mult: Annotated[
        float,
        Setting(
            "Width of the feed-forward, as a multiple of dim; 8/3 gives swiglu the weights of the others with 4.", gt=0
        ),
    ] = 4.0
    ff_width: Annotated[
        int | None, Setting("Number of units of the feed-forward; null: dim × ff_mult, rounded down.", ge=1)
    ] = None
    ff_bias: Annotated[bool, Setting("Biases of the feed-forward.")] = True
    dropout: Annotated[float, Setting("Dropout on the embeddings and on each residual branch.", ge=0, lt=1)] = 0.0
    position: Annotated[Literal["learned", "rotary", "none"], Setting("Position embedding.")] = "learned"
    nope_layers: Annotated[list[int], Setting("Layers, counted from 0, whose attention has no rotary positions.")] = []  # noqa: RUF012 - pydantic gives each configuration a list of its own
    rotary_base: Annotated[float, Setting("Wavelength base of the rotary positions.", gt=1)] = 10000.0
    rotary_scaling: Annotated[
        Literal["none", "llama3", "yarn"],
        Setting("How the rotary positions of short texts serve longer ones: none, llama3 or yarn."),
    ] = "none"
    rotary_factor: Annotated[float, Setting("Factor of the scaling on the longest wavelengths.", ge=1)] = 1.0
    rotary_original_len: Annotated[int | None, Setting("Tokens of a text before the scaling; null: seq_len.", ge=1)] = (
        None
    )
    rotary_low_freq_factor: Annotated[
        float,
        Setting(
            "llama3: a pair of channels that turns fewer times in rotary_original_len gets the whole factor.", gt=0
        ),
    ] = 1.0
    rotary_high_freq_factor: Annotated[
        float, Setting("llama3: a pair of channels that turns more times in rotary_original_len stays as it is.", gt=0)
    ] = 4.0
    rotary_beta_fast: Annotated[
        float, Setting("yarn: a pair of channels that turns more times in rotary_original_len stays as it is.", gt=0)
    ] = 32.0
    rotary_beta_slow: Annotated[
        float,
        Setting("yarn: a pair of channels that turns fewer times in rotary_original_len gets the whole factor.", gt=0),
    ] = 1.0
    rotary_attention_factor: Annotated[
        float | None, Setting("yarn: factor on queries and keys; null: 0.1·ln(rotary_factor) + 1.", gt=0)
    ] = None
    norm: Annotated[Literal["layernorm", "rmsnorm"], Setting("Normalisation before each branch.")] = "layernorm"
    norm_eps: Annotated[
        float | None,
        Setting(
            "Number that every norm adds to the variance or mean square; null: 1e-5 in layernorm, 1e-6 in rmsnorm and "
            "in the norms of queries and keys.",
            gt=0,
        ),
    ] = None
    qk_norm: Annotated[
        bool, Setting("RMS-normalise queries and keys, with a learned gain for each dimension of a head.")
    ] = False
    tied_embeddings: Annotated[bool, Setting("Compute the logits with the transposed token embedding.")] = False
    logits_bias: Annotated[bool, Setting("A bias of the logits; tied embeddings have none.")] = True
    null_kv: Annotated[int, Setting("Learned key/value pairs of each key head that every query sees.", ge=0)] = 0

    attention: Annotated[
        Literal["softmax", "coordinate-descent", "tempered-softmax", "hard-topk", "entmax"],
        Setting(
            "Attention weights of the scores s: softmax(s); coordinate-descent, the soft top-k; or as its controls "
            "tempered-softmax, softmax(s/ε); hard-topk, softmax(s/ε) of the ⌊attn_k⌋ largest; entmax, entmax 1.5 of "
            "s/ε (an optional package).",
            flag="--attention",
        ),
    ] = "coordinate-descent"
    attn_k: Annotated[
        float, Setting("Budget k of an attention row: it may attend fully to k keys.", flag="--attn-k", gt=0)
    ] = 2.0
    attn_eps: Annotated[
        float,
        Setting(
            "Temperature ε of the attention weights; softmax has none.",
            flag="--eps",
            flag_help="Temperature ε, of the attention weights and of the feed-forward.",
            by_preset=True,
            gt=0,
        ),
    ] = 0.1
    normalise: Annotated[
        Literal["none", "k"],
        Setting(
            "k: divide each head's output by the k of its row, which makes a row without a capped weight a plain "
            "average, by softmax(s/ε); none: leave it as the sum."
        ),
    ] = "none"
    learned_k: Annotated[
        bool,
        Setting(
            "A k for each query and head, up to attn_k: 1 + (attn_k − 1)·sigmoid(linear(normed input)).",
            flag="--learned-k/--fixed-k",
            by_preset=True,
        ),
    ] = False
    learned_k_bias: Annotated[float, Setting("Initial bias of the linear of a learned k; −10 starts at k ≈ 1.")] = -10.0
    output_gate: Annotated[
        bool, Setting("Scale each head's output by a learned gate for each query: the control for learned_k.")
    ] = False
    output_gate_range: Annotated[
        Literal["budget", "unit"],
        Setting(
            "budget: the gate is 1 + (attn_k − 1)·sigmoid, of the learned k's form and initial bias; unit: it is a "
            "sigmoid with initial bias 0, whatever attn_k is."
        ),
    ] = "budget"
    output_gate_max: Annotated[
        float | None,
        Setting(
            "Largest gate of output_gate_range budget, in place of attn_k; null: attn_k. A fork with another attn_k "
            "keeps the gates of its trunk by it.",
            ge=1,
        ),
    ] = None
    eps_anneal_start: Annotated[float | None, Setting("ε of the attention at step 0; null: no annealing.", gt=0)] = None
    eps_anneal_begin: Annotated[
        float, Setting("Share of the schedule at which ε begins to anneal, such as that of a fork.", ge=0, lt=1)
    ] = 0.0
    eps_anneal_share: Annotated[float, Setting("Share of the schedule after which ε is attn_eps.", gt=0, le=1)] = 0.5

    ff: Annotated[
        Activation,
        Setting(
            "Feed-forward activation of the units x: gelu; gelu-tanh, its approximation in GPT-2; coordinate-descent, "
            "their soft top-k λ; coordinate-descent-linear, λ·x; coordinate-descent-relu2, λ·max(0, x)²; relu2, "
            "max(0, x)²; hard-topk, relu2 of the ⌊ff_k⌋ largest; with a third matrix swiglu, silu(gate)·x, reglu, "
            "max(0, gate)·x, and coordinate-descent-glu, λ(gate)·x; with a router blocks, relu2 in blocks of units "
            "times the soft top-k of blocks, or as control hard-topk-blocks, times the ⌊ff_k⌋ largest k·softmax(s/ε).",
            flag="--ff",
            by_preset=True,
        ),
    ] = "gelu"
    ff_k: Annotated[float, Setting("Budget k of a feed-forward row: units or blocks.", flag="--ff-k", gt=0)] = 128.0
    ff_eps: Annotated[float, Setting("Temperature ε of the feed-forward.", flag="--eps", gt=0)] = 0.1
    ff_block_size: Annotated[int, Setting("Units of a block of the feed-forward.", ge=1)] = 64
    ff_tolerance: Annotated[
        float, Setting("Soft top-k weights up to this count as 0, in training too; not with coordinate-descent.", ge=0)
    ] = 1e-3

    solver: Annotated[
        Literal["exact", "iterative"], Setting("How the soft top-k is solved.", flag="--solver", by_preset=True)
    ] = "exact"
    n_iters: Annotated[int, Setting("Iterations of the iterative solver.", ge=1)] = 20
    eps_init: Annotated[float, Setting("First ε of the iterative solver.", gt=0)] = 4.0
    eps_decay: Annotated[float, Setting("Factor on ε for each iteration.", gt=0, le=1)] = 0.7


class DataSettings(Table):
    """Text and tokens."""

    source: Annotated[
        str,
        Setting(
            "stdlib, a file, glob or folder (any text, .jsonl .json .csv .parquet, also packed: .gz .bz2 .xz .zst "
            ".lz4; a folder of save_to_disk), http(s)://ADDRESS, also with #sha256=HEX, hf:OWNER/NAME[:CONFIG], or a "
            "synthetic task: task:NAME[?PARAMETERS].",
            flag="--data",
        ),
    ] = "stdlib"
    split: Annotated[str, Setting("Split of a dataset that is trained on.", flag="--data-split")] = "train"
    text_column: Annotated[str, Setting("Column that holds the text.", flag="--text-column")] = "text"
    encoding: Annotated[
        str,
        Setting("Encoding of local text, JSON and CSV files, such as utf-8, utf-16 or cp1252.", flag="--encoding"),
    ] = "utf-8"
    streaming: Annotated[
        bool, Setting("Tokenise while training; prepare and cache no tokens.", flag="--streaming/--no-streaming")
    ] = False
    tokenizer: Annotated[
        str, Setting("bytes, bpe:N (trained on the training text), a tokenizer.json, or a hub id.", flag="--tokenizer")
    ] = "bytes"
    bos: Annotated[
        str | None,
        Setting("Special token of the tokenizer.json that begins each document and each prompt; null: none."),
    ] = None
    eos: Annotated[
        str | None,
        Setting(
            "Special token of the tokenizer.json that ends each document and each sample; null: the first that it has "
            "of <|endoftext|>, </s> and their like, or else one of its own."
        ),
    ] = None
    validation_fraction: Annotated[float, Setting("Share of the text that is held out for validation.", gt=0, lt=1)] = (
        0.1
    )


class OptimSettings(Table):
    """Optimisation. Tokens per step = batch_size × grad_accum × seq_len."""

    steps: Annotated[
        int,
        Setting(
            "Optimizer steps; may be raised when a run is resumed.", flag="--steps", short="-s", by_preset=True, ge=1
        ),
    ] = 1000
    schedule_steps: Annotated[int | None, Setting("Length of the learning-rate schedule; null: steps.", ge=1)] = None
    schedule: Annotated[Literal["cosine", "constant"], Setting("Learning rate after the warm-up.")] = "cosine"
    batch_size: Annotated[int, Setting("Sequences in a forward pass.", flag="--batch-size", by_preset=True, ge=1)] = 16
    grad_accum: Annotated[int, Setting("Forward passes in a step.", flag="--grad-accum", by_preset=True, ge=1)] = 1
    optimizer: Annotated[
        Literal["adamw", "muon"],
        Setting("adamw, or muon for the matrices within blocks and AdamW for the rest."),
    ] = "adamw"
    lr: Annotated[
        float, Setting("Peak learning rate, of Muon and AdamW alike.", flag="--lr", by_preset=True, gt=0, le=1e3)
    ] = 1e-3
    min_lr_ratio: Annotated[float, Setting("Final learning rate, as a share of lr.", ge=0, le=1)] = 0.1
    warmup_steps: Annotated[int, Setting("Steps of linear warm-up.", ge=0)] = 50
    weight_decay: Annotated[float, Setting("Weight decay, on matrices only.", ge=0)] = 0.1
    beta1: Annotated[float, Setting("AdamW's decay of the mean gradient.", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Setting("AdamW's decay of the mean squared gradient.", ge=0, lt=1)] = 0.95
    clip: Annotated[float, Setting("Largest gradient norm; 0: no clipping.", ge=0)] = 1.0
    truncated_share: Annotated[
        float,
        Setting(
            "Share of the steps on which attention keeps only the truncated_keys largest weights of a row, as "
            "cda eval --cut top:N does; 0: none.",
            ge=0,
            le=1,
        ),
    ] = 0.0
    truncated_keys: Annotated[int, Setting("Keys that a row keeps on a truncated step.", ge=1)] = 16
    ema_decay: Annotated[
        float, Setting("Decay of a moving average of the weights, such as 0.999; 0: none.", ge=0, lt=1)
    ] = 0.0
    max_refused: Annotated[
        int, Setting("Batches in a row without a finite loss and gradient after which a run ends.", ge=1)
    ] = 5


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
        Literal["ddp", "fsdp"],
        Setting(
            "How several processes hold the weights: as whole copies (ddp) or as shards (fsdp).", flag="--parallel"
        ),
    ] = "ddp"
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
    keep: Annotated[int, Setting("Number of newest checkpoints to keep.", ge=2)] = 2
    keep_best: Annotated[
        bool,
        Setting("Also keep the checkpoint of the lowest validation loss, of those saved at a validated step."),
    ] = True
    patience: Annotated[
        int, Setting("Validations in a row without a new lowest loss after which the run ends; 0: never.", ge=0)
    ] = 0


SECTIONS: dict[str, type[Table]] = {
    "model": ModelSettings, "data": DataSettings, "optim": OptimSettings, "run": RunSettings,
}  # fmt: skip


def preset_names() -> list[str]:
    """Sorted by name."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))
