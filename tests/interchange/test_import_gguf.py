"""A GGUF file, as llama.cpp's converter writes one, makes a run with the logits and the tokens of its model."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.data import Tokenizer
from cda_cli.errors import CdaError
from cda_cli.interchange.gguf_file import open_gguf
from tests.data.samples import LETTERS, UNICODE
from tests.interchange.gguf_writing import F32, NORMAL, Q8_0, SIZE, Vocabulary, byte_level, sentencepiece, write
from tests.interchange.models import (
    CLOSE,
    gpt2,
    imported,
    llama,
    logits,
    mistral,
    qwen2,
    qwen3,
    randomised,
    restored,
    tokens,
)

MODELS: dict[str, Any] = {
    "llama": lambda: llama(vocab_size=SIZE),
    "llama, tied": lambda: llama(vocab_size=SIZE, tie_word_embeddings=True, head_dim=16),
    "mistral": lambda: mistral(vocab_size=SIZE, num_key_value_heads=1),
    "qwen2": lambda: qwen2(vocab_size=SIZE),
    "qwen3": lambda: qwen3(vocab_size=SIZE),
    "gpt2": lambda: gpt2(vocab_size=SIZE),
}
BATCH = tokens(vocabulary=SIZE)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """The file has every weight as it was; llama.cpp's layout of queries and keys, and of Conv1D, is undone."""
    model = randomised(MODELS[name]())
    write(model, tmp_path / "model.gguf", byte_level())
    found = imported(tmp_path / "model.gguf", tmp_path / "run")
    torch.testing.assert_close(logits(restored(tmp_path / "run").model, BATCH), logits(model, BATCH), **CLOSE)
    assert found.origin["license"] == "apache-2.0"


def test_the_rotary_factors_of_llama_3_become_its_scaling(tmp_path: Path) -> None:
    """llama.cpp writes them as a tensor. They must be those of the formula: others are refused, by a test below."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 1e6,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = randomised(llama(vocab_size=SIZE, head_dim=16, max_position_embeddings=65536, rope_parameters=scaling))
    plain = 1e6 ** (-torch.arange(0, 16, 2) / 16)
    factors = {"rope_freqs.weight": (plain / model.model.rotary_emb.inv_freq).numpy()}
    write(model, tmp_path / "model.gguf", byte_level(), F32, factors)
    found = imported(tmp_path / "model.gguf", tmp_path / "run", seq_len=512).config.model
    assert (found.rotary_scaling, found.rotary_factor) == ("llama3", 32.0)
    batch = tokens(512, SIZE)
    torch.testing.assert_close(logits(restored(tmp_path / "run").model, batch), logits(model, batch), **CLOSE)
    model.model.rotary_emb.inv_freq.copy_(plain)
    restored_logits = logits(restored(tmp_path / "run").model, batch)
    assert (restored_logits - logits(model, batch)).abs().max() > 0.1, "the test would pass without the scaling"


def test_a_quantised_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    write(randomised(MODELS["llama"]()), tmp_path / "model.gguf", byte_level(), Q8_0)
    imported(tmp_path, tmp_path / "run")  # the folder holds one file
    how: Any = {"gguf_file": "model.gguf", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval()
    torch.testing.assert_close(logits(restored(tmp_path / "run").model, BATCH), logits(model, BATCH), **CLOSE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def tokenizer_of(vocabulary: Vocabulary, folder: Path, name: str) -> Tokenizer:
    """The tokenizer of a run that is imported with `vocabulary`."""
    if not (folder / name).exists():
        write(randomised(MODELS["llama"]()), folder / f"{name}.gguf", vocabulary)
        imported(folder / f"{name}.gguf", folder / name)
    return restored(folder / name).tokenizer


TEXTS = [*LETTERS, UNICODE, "it's 1234 and 5678, DON'T 12  34\n\n  x\tthe  cat's <|im_end|>", "", " ", "\n"]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2"])
def test_a_byte_level_vocabulary_splits_text_as_transformers_does(pre: str, folder: Path) -> None:
    ours = tokenizer_of(byte_level(pre), folder, pre)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=f"{pre}.gguf")
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert list(ours.encode(text)) == expected, text
        assert ours.decode(ours.encode(text)) == text


def test_smollm_makes_a_token_of_each_digit(folder: Path) -> None:
    vocabulary = byte_level("smollm")
    ours = tokenizer_of(vocabulary, folder, "smollm")
    assert "12" in vocabulary.tokens, "the vocabulary must have a token of two digits"
    assert [vocabulary.tokens[id] for id in ours.encode("1234")] == ["1", "2", "3", "4"]
    assert len(tokenizer_of(byte_level("gpt-2"), folder, "gpt-2").encode("1234")) < 4


def joined_by_score(text: str, vocabulary: Vocabulary) -> list[int]:
    """SentencePiece's BPE: it joins the two neighbours whose whole has the best score, until none is left."""
    assert vocabulary.scores is not None
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    known = zip(vocabulary.tokens, vocabulary.kinds, vocabulary.scores, strict=True)
    scores = {token: score for token, kind, score in known if kind == NORMAL}
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [left + right for left, right in itertools.pairwise(pieces)]
        possible = [(scores[piece], -at) for at, piece in enumerate(joined) if piece in scores]
        if not possible:
            break
        at = -max(possible)[1]
        pieces[at : at + 2] = [joined[at]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in scores else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


@pytest.fixture(scope="module")
def joining(folder: Path) -> Tokenizer:
    return tokenizer_of(sentencepiece(), folder, "sentencepiece")


@given(st.text(st.sampled_from("thecating .é日'"), max_size=20))
def test_a_sentencepiece_vocabulary_joins_by_score(joining: Tokenizer, text: str) -> None:
    assert list(joining.encode(text)) == joined_by_score(text, sentencepiece())
    assert joining.decode(joining.encode(text)) == text


@pytest.mark.parametrize(
    ("vocabulary", "bos", "eos"),
    [
        (byte_level(), None, "<|im_end|>"),
        (byte_level(add_bos=True), "<|im_start|>", "<|im_end|>"),
        (byte_level("llama-bpe"), "<|im_start|>", "<|im_end|>"),
        (sentencepiece(), "<s>", "</s>"),
        (sentencepiece(add_bos=False), None, "</s>"),
    ],
)
def test_the_tokens_that_begin_and_end_a_document_come_along(
    vocabulary: Vocabulary, bos: str | None, eos: str, tmp_path: Path
) -> None:
    """As the file says, or as llama.cpp has it where the file does not."""
    write(randomised(MODELS["llama"]()), tmp_path / "model.gguf", vocabulary)
    data = imported(tmp_path / "model.gguf", tmp_path / "run").config.data
    assert (data.bos, data.eos) == (bos, eos)
    tokenizer = restored(tmp_path / "run").tokenizer
    assert [vocabulary.tokens[id] for id in tokenizer.beginning.ids] == [bos] * (bos is not None)
    assert vocabulary.tokens[tokenizer.separator] == eos
    assert tokenizer.vocab_size == SIZE
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json() or "")
    assert [inner.id_to_token(id) for id in range(SIZE)] == vocabulary.tokens


def refused(file: Path, tmp_path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(CdaError) as caught:
        imported(file, tmp_path / "run", **options)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("cache", file.name)] == []


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.01, 0.3, 0.99])
def test_a_file_that_is_cut_short_is_refused(keep: float, tmp_path: Path) -> None:
    file = write(randomised(MODELS["llama"]()), tmp_path / "model.gguf", byte_level())
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    refused(file, tmp_path, "model.gguf", "cut short", "download")


def test_what_the_model_has_no_use_for_is_named(tmp_path: Path) -> None:
    model, extra = randomised(MODELS["llama"]()), {"rope_freqs.weight": np.array([1, 1, 2, 8], np.float32)}
    file = write(model, tmp_path / "model.gguf", byte_level(), F32, extra)
    refused(file, tmp_path, "rope_freqs.weight")


def test_yarn_is_read_with_its_factor_on_queries_and_keys(tmp_path: Path) -> None:
    """convert_hf_to_gguf.py of llama.cpp writes `attention_factor` as rope.scaling.yarn_attn_factor."""
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 16.0, "yarn_attn_factor": 1.75}
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.75}
    model = randomised(qwen2(vocab_size=SIZE, rope_parameters=rope | {"rope_theta": 1000.0}))
    metadata = {f"rope.scaling.{key}": value for key, value in scaling.items()}
    write(model, tmp_path / "model.gguf", byte_level(), metadata=metadata)
    imported(tmp_path / "model.gguf", tmp_path / "run")
    torch.testing.assert_close(logits(restored(tmp_path / "run").model, BATCH), logits(model, BATCH), **CLOSE)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_linear_scaling_without_a_type_is_refused(key: str, tmp_path: Path) -> None:
    """llama.cpp divides all positions by this factor; without it the model would be another."""
    file = write(randomised(MODELS["llama"]()), tmp_path / "model.gguf", byte_level(), metadata={key: 4.0})
    refused(file, tmp_path, "'linear'", "yarn")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = randomised(MODELS["llama"]())
    del model.model.layers[1].mlp.up_proj
    refused(write(model, tmp_path / "model.gguf", byte_level()), tmp_path, "model.layers.1.mlp.up_proj.weight")


def test_a_tokenizer_that_is_not_known_is_refused(tmp_path: Path) -> None:
    vocabulary = byte_level("of-tomorrow")
    file = write(randomised(MODELS["llama"]()), tmp_path / "model.gguf", vocabulary)
    refused(file, tmp_path, "of-tomorrow", "--tokenizer")
    vocabulary = byte_level()
    vocabulary.model = "t5"
    refused(write(randomised(MODELS["llama"]()), file, vocabulary), tmp_path, "'t5'", "--tokenizer")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "model.gguf", tmp_path, "'rwkv6'", "llama")


def test_without_the_library_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CdaError, match="pip install gguf"):
        open_gguf(tmp_path / "model.gguf")
