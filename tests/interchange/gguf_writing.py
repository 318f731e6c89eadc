"""Writes the models of the tests as llama.cpp's converter does, and small vocabularies as GGUF has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

TEXTS = [
    "the cat sat in the hat, where that rat ran",
    "DON'T it isn't  there; they're where we've been",
    "naïve façade of the café, and another one",
    "it's 12, 123 and 1234, don't say 12, 34 or 5678  it's\n\n x",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0
SIZE = 320
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass
class Vocabulary:
    """The metadata of a tokenizer; `pre` None leaves out what only a byte-level BPE has."""

    model: str
    tokens: list[str]
    kinds: list[int]
    bos: int
    eos: int
    merges: list[str] | None = None
    scores: list[float] | None = None
    pre: str | None = None
    add_bos: bool | None = None

    def write(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.add_bos is not None:
            writer.add_add_bos_token(self.add_bos)


def byte_level(pre: str = "default", add_bos: bool | None = None) -> Vocabulary:
    """A byte-level BPE of SIZE tokens, whose first three are control tokens."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=SIZE, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(made.to_str())["model"]
    assert len(model["vocab"]) == SIZE, "the texts are too short for a vocabulary of this size"
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [CONTROL if token in MARKS else NORMAL for token in tokens]
    merges = [" ".join(pair) for pair in model["merges"]]
    return Vocabulary("gpt2", tokens, kinds, 1, 2, merges=merges, pre=pre, add_bos=add_bos)


def sentencepiece(add_bos: bool | None = None) -> Vocabulary:
    """▁words with scores, and a token for each byte: what Llama 2 has."""
    pieces = ["▁the", "the", "▁th", "th", "▁t", "he", "▁a", "▁c", "at", "▁ca", "▁cat", "in", "▁in", "ing"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,'"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    tokens += [f"<extra_{number}>" for number in range(SIZE - len(tokens))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    kinds += [NORMAL] * (len(pieces) + len(letters))
    kinds += [CONTROL] * (SIZE - len(kinds))
    scores = [0.0] * 259 + [-float(rank) for rank in range(SIZE - 259)]
    return Vocabulary("llama", tokens, kinds, 1, 2, scores=scores, add_bos=add_bos)


def write(
    model: Any,
    file: Path,
    vocabulary: Vocabulary,
    kind: Any = F32,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    metadata: Mapping[str, str | float] = MappingProxyType({}),
) -> Path:
    """Writes a model of transformers as GGUF: matrices of the type `kind`, and the rest as F32.

    `extra` are more tensors, and `metadata` more keys, after the name of the architecture.
    """
    config, name = model.config, model.config.model_type
    name = "llama" if name == "mistral" else name
    writer = gguf.GGUFWriter(file, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if name == "gpt2":
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)
        writer.add_rope_dimension_count(head_width)
    for key, value in metadata.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{name}.{key}", value)
    writer.add_license("apache-2.0")
    vocabulary.write(writer)
    names = gguf.get_tensor_name_map({word: kind for kind, word in gguf.MODEL_ARCH_NAMES.items()}[name], 2)
    for their, tensor in model.state_dict().items():
        if their == "lm_head.weight" and config.tie_word_embeddings:
            continue
        base, _, part = their.rpartition(".")
        values = tensor.numpy()
        if name == "gpt2" and part == "weight" and ".c_" in base:
            values = values.T
        if name == "llama" and any(each in base for each in ("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in base else config.num_key_value_heads
            values = permuted(values, heads)
        add(writer, f"{names.get_name(base)}.{part}", values, kind)
    for its, values in (extra or {}).items():
        add(writer, its, values, F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def permuted(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's convert_hf_to_gguf.py reorders the rows of queries and keys: the halves of a head alternate."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray[Any, Any], kind: Any) -> None:
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim == 1 or kind == F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
