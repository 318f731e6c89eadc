"""The settings of a model."""

# Annotations are evaluated here: pydantic before 2.10 would look for their names in the module of the subclass.

from typing import Annotated, Literal

from cda_cli.settings.setting import Setting, Table

Activation = Literal[
    "gelu", "gelu-tanh", "coordinate-descent", "coordinate-descent-linear", "coordinate-descent-relu2",
    "coordinate-descent-glu", "relu2", "hard-topk", "swiglu", "reglu", "blocks", "hard-topk-blocks",
    "sigmoid-topk-blocks",
]  # fmt: skip


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
            "Width of the feed-forward, as a multiple of dim; with a gate 2.6667 has the weights of 4 without.", gt=0
        ),
    ] = 4.0
    ff_width: Annotated[
        int | None, Setting("Number of units of the feed-forward; null: dim × ff_mult, rounded down.", ge=1)
    ] = None
    ff_bias: Annotated[bool, Setting("Biases of the feed-forward.")] = True
    dropout: Annotated[float, Setting("Dropout on the embeddings and on each residual branch.", ge=0, lt=1)] = 0.0
    position: Annotated[
        Literal["learned", "rotary", "none", "nape"],
        Setting(
            "Position embedding: learned, rotary or none; nape is ALiBi in the first half of the heads, with slopes 1, "
            "1/2, 1/3, …, and nothing in the others."
        ),
    ] = "learned"
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
            "s/ε.",
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
    learned_eps: Annotated[
        bool, Setting("A temperature of each head: ε times a learned factor, which begins at 1.")
    ] = False
    length_scaling: Annotated[
        Literal["none", "log-n", "adaptive"],
        Setting(
            "Factor on the scores of a query that sees n keys, but in ALiBi heads: none; log-n, s·log n with a learned "
            "s of each head, which makes it 1 at seq_len at first; adaptive, 1 + softplus(β)·log(n + 1)^(2·tanh γ), "
            "with β and γ linear in the normed input, which is near 1 at first."
        ),
    ] = "none"
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
            "times the soft top-k of blocks, or as controls hard-topk-blocks, times the ⌊ff_k⌋ largest k·softmax(s/ε), "
            "and sigmoid-topk-blocks, times the ⌊ff_k⌋ largest sigmoid(s/ε).",
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
