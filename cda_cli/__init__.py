"""cda: Transformers whose layers select with coordinate-descent sparsity (the entropic soft top-k).

    import cda_cli

    lm = cda_cli.load("runs/first")
    print(lm.generate("ROMEO:", seed=1))

Importing the package imports no torch: `load` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cda_cli.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from cda_cli.inspected_models import InspectedModel, TextTokenizer
    from cda_cli.language_model import LanguageModel
    from cda_cli.ops import Backend
    from cda_cli.settings import Dtype
    from cda_cli.sparsity_report import SparsityReport

__all__ = ["__version__", "inspect", "load"]


def load(
    path: str | Path,
    *,
    best: bool = False,
    ema: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
) -> LanguageModel:
    """Loads a trained model with its tokenizer, ready to score and to generate text.

    `path` is a checkpoint or a run, of which it takes the newest whole checkpoint, or with `best` that of the lowest
    validation loss. `ema` takes the moving average of the weights. It may also be a folder that `cda export` wrote, or
    one of transformers that `cda import` takes. `device` is "auto", "cpu", "cuda", "cuda:1" …; `dtype` is the precision
    of the matrix products, by default bfloat16 on a GPU that has it and float32 elsewhere; `backend` chooses the code
    of the operator. All of them mean what the options of `cda eval` mean.

    Raises `cda_cli.errors.CdaError`, in one sentence: CheckpointError if there is no such checkpoint or it is damaged,
    DeviceError if this machine lacks the device, ConfigError for another argument that cannot be.
    """
    from cda_cli.language_model import load_language_model

    return load_language_model(path, best=best, ema=ema, device=device, dtype=dtype, backend=backend)


def inspect(
    model: InspectedModel,
    text: str,
    *,
    tokenizer: TextTokenizer | None = None,
    context: int | None = None,
    causal: bool = False,
    keep: float = 0.99,
    budget: str | int = "12MB",
    device: str = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
) -> SparsityReport:
    """Looks at what each layer and head of a model selects on `text`, and returns a report of it.

    `model` is what `load` takes, or what it returned. It may also be a decoder of Hugging Face transformers, with
    softmax or soft top-k (`cda_cli.transformers`), which stays on its device and in its dtype. Then `tokenizer` is its
    tokenizer. `context` is the tokens of a window, if those are fewer than the model takes.

    All windows of the text make the figures. Of the first one the report also has the weights: of each row the largest,
    until they have the share `keep` of its mass, in `budget` bytes or fewer.

    With `causal` a report of a run also has the causal checks of `cda inspect-sparsity --causal` on the same text, and
    the gradients of each head.

    Raises `cda_cli.errors.CdaError`, in one sentence, as `load` does, and ConfigError for a text or a budget that is
    too small, and for a model whose attention cannot be seen.
    """
    from cda_cli.inspected_models import inspect_model

    return inspect_model(
        model,
        text,
        tokenizer=tokenizer,
        context=context,
        causal=causal,
        keep=keep,
        budget=budget,
        device=device,
        dtype=dtype,
        backend=backend,
    )
