"""Small random models of each family, as transformers saves them, and what the tests ask of an imported run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn

from cda_cli.interchange.import_model import Imported, import_model
from cda_cli.restore import Restored, restore

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY, CONTEXT = 96, 64
# Two computations in float32 of logits up to about 20 differ by the order of their sums: some 1e-7 of each.
CLOSE = {"atol": 1e-4, "rtol": 0.0}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 93,
    "eos_token_id": 94,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def gpt2(**settings: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": 94, "eos_token_id": 94}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | ends | settings))


def llama(**settings: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | settings))


def qwen2(**settings: Any) -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | settings))


def qwen3(**settings: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES | {"head_dim": 16} | settings))


def mistral(**settings: Any) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES | {"sliding_window": None} | settings))


# Each with the name of its family.
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "gpt2": ("gpt2", gpt2),
    "gpt2, untied": ("gpt2", lambda: gpt2(tie_word_embeddings=False, n_inner=48, activation_function="gelu")),
    "llama": ("llama", llama),
    "llama 3": ("llama", lambda: llama(rope_parameters=LLAMA3, tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "llama, biases": ("llama", lambda: llama(attention_bias=True, mlp_bias=True, head_dim=16)),
    "qwen2": ("qwen2", qwen2),
    "qwen2, yarn": ("qwen2", lambda: qwen2(rope_parameters=YARN, tie_word_embeddings=True)),
    "qwen3": ("qwen3", lambda: qwen3(rope_parameters=YARN)),
    "mistral": ("mistral", lambda: mistral(sliding_window=CONTEXT)),
}


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """`model` in evaluation mode, with weights that all show in the logits: norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.mean() + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(model: Any, folder: Path, **how: Any) -> Path:
    """Saves `model` into `folder` with a tokenizer."""
    model.save_pretrained(folder, **how)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, size: int = VOCABULARY - 3) -> None:
    """A tokenizer of `size` words and <unk>, <s> and </s>, whose ids follow one another."""
    vocabulary = {**{f"w{number}": number for number in range(size)}, "<s>": size, "</s>": size + 1, "<unk>": size + 2}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))


@contextlib.contextmanager
def _no_progress(total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def imported(source: object, out: Path, **options: Any) -> Imported:
    return import_model(str(source), out, _no_progress, **options)


def restored(run: Path) -> Restored:
    return restore(run, torch.device("cpu"))


def tokens(length: int = CONTEXT, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, batch: Tensor) -> Tensor:
    """The logits [B, T, V] of a model of ours or of transformers."""
    with torch.no_grad():
        result = model(batch)
    return result if isinstance(result, Tensor) else result.logits
