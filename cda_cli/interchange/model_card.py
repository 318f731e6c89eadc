"""The model card of an exported folder: what the model is, and the figures that its run has measured of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

import yaml

from cda_cli.interchange.weights import read_json
from cda_cli.restore import Restored
from cda_cli.runs.folder import ORIGIN_FILE, Run
from cda_cli.runs.records import LayerRecord, Record, TrainRecord, ValidationRecord
from cda_cli.storage import CHECKPOINTS
from cda_cli.version import __version__


def model_card(restored: Restored, name: str, license: str | None, library: str, loading: str) -> str:
    """Returns the card as Markdown. `library` loads the model, and the section `loading` says how.

    The licence is `license`, or else that of the model that was imported, if it stated one. The card gives only figures
    that the run has measured at the step of the checkpoint, or last before it where it says so.
    """
    origin = _origin(restored)
    header = {
        "license": license or origin.get("license") or "unknown",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["cda"],
    }
    settings = restored.config.model_dump(include={"model", "optim"})
    sections = {
        "Evaluation": _evaluation(restored),
        "Sparsity": _sparsity(restored),
        "Data": _data(restored),
        "How to load": loading,
        "Settings": f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```\n",
    }
    parts = [f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {name}\n\n{_model(restored, origin)}"]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items()]
    return "\n".join(parts)


def _origin(restored: Restored) -> Mapping[str, Any]:
    """What source.json says of the imported model that the run holds, or began from; empty where there is none."""
    for checkpoint in (str(restored.path), restored.config.run.init_from):
        if checkpoint is None:
            continue
        file = Path(checkpoint).expanduser().resolve().parent.parent / ORIGIN_FILE
        if file.is_file():
            return read_json(file)
    return {}


def _model(restored: Restored, origin: Mapping[str, Any]) -> str:
    model, state = restored.model, restored.state
    weights = "moving average of the weights" if restored.averaged else "as trained"
    rows = {"imported from": _public_name(str(origin.get("source")))} if origin else {}
    rows |= {
        "parameters": f"{model.parameter_count():,}",
        "attention": model.attention_description,
        "feed-forward": restored.config.model.ff,
        "context": f"{restored.config.model.seq_len:,} tokens",
        "trained": f"{state['step']:,} steps, {state['tokens']:,} tokens",
        "weights": weights,
        "exported with": f"cda-cli {__version__}",
    }
    return "A causal language model, exported by `cda`.\n\n" + _table(("", ""), rows.items())


def _evaluation(restored: Restored) -> str:
    step = restored.state["step"]
    found = next((record for record in _records(restored, ValidationRecord) if record.step == step), None)
    loss = found and (found.ema_loss if restored.averaged else found.loss)
    if found is None or loss is None:
        return "The run has not measured this checkpoint.\n"
    bits = found.ema_bits_per_byte if restored.averaged else found.bits_per_byte
    # The run records no standard errors of the averaged weights.
    errors = (math.nan, math.nan) if restored.averaged else (found.standard_error, found.bits_per_byte_error)
    rows = {
        "loss": f"{_plus_minus(loss, errors[0])} nats per token",
        "perplexity": f"{math.exp(loss):.4g}",
        "bits per byte": _plus_minus(bits, errors[1]) if bits is not None else "–",
        "tokens": f"{found.tokens:,} in {found.windows:,} windows",
    }
    where = f"Measured in training after step {step:,}, on text that was held out, as mean ± standard error."
    return f"{where}\n\n{_table(('', ''), rows.items())}"


def _sparsity(restored: Restored) -> str:
    step = restored.state["step"]
    found = next((record for record in _records(restored, TrainRecord, True) if record.step <= step), None)
    if found is None or not found.layers:
        return "The run has no record of what its layers select.\n"
    about = {name: get_args(hint)[1] for name, hint in get_type_hints(LayerRecord, include_extras=True).items()}
    names = [field.name for field in fields(LayerRecord) if getattr(found.layers[0], field.name) is not None]
    rows = [[f"{getattr(layer, name):.4g}" for name in names] for layer in found.layers]
    how = (
        f"Measured at training step {found.step:,}, with the weights as trained: means over the heads of a layer and "
        "over the first sequence of that step."
    )
    meanings = [
        f"- {name}: {about[name].meaning}" + f" ({about[name].unit})" * bool(about[name].unit) for name in names
    ]
    return f"{how}\n\n{_table(names, rows)}\n" + "\n".join(meanings) + "\n"


def _data(restored: Restored) -> str:
    data = restored.config.data
    if not restored.state["tokens"]:
        return "The run has trained on no text.\n"
    rows = {
        "text": _public_name(data.source),
        "tokenizer": f"{_public_name(data.tokenizer)}, {restored.tokenizer.vocab_size:,} tokens",
        "held out for validation": f"{data.validation_fraction:g} of the text",
    }
    return _table(("", ""), rows.items())


def _public_name(source: str) -> str:
    """The name of a text or a tokenizer, without the folders of this machine and without what a URL may keep secret."""
    source = source.removeprefix("published:")
    address = urlsplit(source)
    if address.scheme in ("http", "https"):
        return f"{address.scheme}://{address.hostname}{address.path}"
    is_path = Path(source).is_absolute() or Path(source).exists()
    return Path(source).name if is_path else source


def _records(restored: Restored, kind: type[Any], newest_first: bool = False) -> Iterator[Any]:
    """The records of the run that the checkpoint lies in; none where it lies elsewhere."""
    folder = restored.path.resolve().parent
    found: Iterator[Record] = iter(())
    if folder.name == CHECKPOINTS:
        found = Run(folder.parent).records(kind, newest_first=newest_first)
    return found


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def _table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
