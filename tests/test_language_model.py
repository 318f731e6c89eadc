"""`cda_cli.load`: the model of a run as Python uses it, beside what the commands say of the same run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cda_cli
from cda_cli.data import JsonTokenizer, tokenizer_from_json
from cda_cli.errors import CheckpointError, ConfigError, DeviceError
from cda_cli.language_model import LanguageModel
from cda_cli.restore import restore
from cda_cli.storage import locate
from tests.commands.helpers import run_cda

TEXT = "The weights sum to k; none exceeds 1. Ähnlich hier: größer als ε, kleiner als λ."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a tokenizer of its own, an average and a short context. Only to be read."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text((Path(cda_cli.__file__).parent / "signals.py").read_text(), encoding="utf-8")
    sizes = ("model.dim=16", "model.depth=1", "model.heads=2", "optim.ema_decay=0.5", "run.eval_batches=1")
    given = [part for setting in sizes for part in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDA_CACHE", str(folder / "cache"))
        command = ("train", "--data", folder / "text.txt", "--tokenizer", "bpe:280", "--seq-len", "24", "--steps", "2")
        result = run_cda(*command, "--batch-size", "2", "--lr", "0.1", *given, "--out", folder / "run")
    assert result.code == 0, result.err
    return folder / "run"


@pytest.fixture(scope="module")
def lm(run: Path) -> LanguageModel:
    return cda_cli.load(run, device="cpu")


def by_hand(lm: LanguageModel, text: str, first: int = 1) -> float:
    """The sum of log-softmax from token `first` on, in float64."""
    tokens = lm.tokenizer.encode(text).tolist()
    logits = lm.model(torch.tensor([tokens]))[0].double().log_softmax(-1)
    return sum(logits[place - 1, tokens[place]].item() for place in range(first, len(tokens)))


def test_it_has_the_model_and_the_tokenizer_of_the_run(run: Path, lm: LanguageModel) -> None:
    assert lm.path == locate(run)
    assert isinstance(lm.tokenizer, JsonTokenizer)
    assert lm.tokenizer.decode(lm.tokenizer.encode(TEXT)) == TEXT
    assert lm.config.optim.steps == 2
    assert not lm.model.training
    assert repr(lm).startswith(f"<LanguageModel of {locate(run)}: ")
    assert repr(lm).endswith("parameters, cpu, float32>")


def test_a_checkpoint_and_its_average(run: Path, lm: LanguageModel) -> None:
    same, averaged = cda_cli.load(str(lm.path), device="cpu"), cda_cli.load(run, ema=True, device="cpu")
    torch.testing.assert_close(same.logits("abc"), lm.logits("abc"), rtol=0, atol=0)
    assert not torch.equal(averaged.logits("abc"), lm.logits("abc"))


def test_logits_are_those_of_the_model(lm: LanguageModel) -> None:
    text = "The weights"
    tokens = torch.tensor([lm.tokenizer.encode(text).tolist()])
    logits = lm.logits(text)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    torch.testing.assert_close(logits, lm.model(tokens)[0], rtol=0, atol=0)


def test_a_loglikelihood_is_what_cda_eval_counts(run: Path, lm: LanguageModel, tmp_path: Path) -> None:
    """Over several windows, the last of them short. In training a separator ends each document."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 3, encoding="utf-8")
    result = run_cda("eval", run, "--data", file, "--json")
    assert result.code == 0, result.err
    counted = json.loads(result.out)
    assert counted["windows"] > 3
    nats = -lm.loglikelihood(TEXT * 3, with_separator=True)
    assert nats == pytest.approx(counted["loss"] * counted["tokens"], rel=1e-12)


def test_a_loglikelihood_is_the_sum_over_its_tokens(lm: LanguageModel) -> None:
    text = "The weights sum"
    assert lm.loglikelihood(text) == pytest.approx(by_hand(lm, text), abs=1e-5)
    assert lm.loglikelihood("T") == 0.0, "nothing stands before the only token, so none is predicted"


@pytest.mark.parametrize(
    ("context", "continuation"), [("The weights", " sum"), ("The weights ", "sum"), ("self", "."), ("ε und ", "λ")]
)
def test_a_continuation_is_predicted_after_its_context(lm: LanguageModel, context: str, continuation: str) -> None:
    """The tokens are those of the whole text, also where one spans the end of the context."""
    whole, before = (lm.tokenizer.encode(text).tolist() for text in (context + continuation, context))
    first = next(place for place, token in enumerate(whole) if before[place : place + 1] != [token])
    expected = by_hand(lm, context + continuation, first)
    assert lm.loglikelihood((context, continuation)) == pytest.approx(expected, abs=1e-5)


def test_the_parts_of_a_text_add_up(lm: LanguageModel) -> None:
    parts = ("The weights", " sum"), ("The weights sum", " to k")
    together = lm.loglikelihood("The weights") + sum(map(lm.loglikelihood, parts))
    assert together == pytest.approx(lm.loglikelihood("The weights sum to k"), abs=1e-5)
    ended = lm.loglikelihood((TEXT[:20], ""), with_separator=True)
    logits = lm.logits(TEXT[:20])[-1].double().log_softmax(-1)
    assert ended == pytest.approx(logits[lm.tokenizer.separator].item(), abs=1e-5)
    assert lm.loglikelihood((TEXT[:20], "")) == 0.0


def test_the_token_that_begins_a_document_stands_in_front(run: Path) -> None:
    """The first token of a text is then predicted too, also without a context."""
    restored = restore(run, torch.device("cpu"))
    tokenizer = tokenizer_from_json(restored.tokenizer.to_json(), bos="<|endoftext|>")
    lm = LanguageModel(restored._replace(tokenizer=tokenizer), torch.float32)
    tokens = [tokenizer.separator, *tokenizer.encode("The weights").tolist()]
    logits = lm.logits("The weights")
    torch.testing.assert_close(logits, lm.model(torch.tensor([tokens]))[0])
    expected = logits.double().log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].sum().item()
    assert lm.loglikelihood("The weights") == pytest.approx(expected, abs=1e-5)
    assert lm.loglikelihood(("", "The weights")) == pytest.approx(expected, abs=1e-5)


def test_a_long_context_is_cut_from_the_left(lm: LanguageModel) -> None:
    """The continuation sees as many tokens as the model can: what lies further back makes no difference."""
    tokens = lm.tokenizer.encode(TEXT).tolist()
    assert len(tokens) > 2 * 24
    ending = lm.tokenizer.decode(tokens[-3:])
    seen = torch.tensor([tokens[-25:-1]])
    logits = lm.model(seen)[0].double().log_softmax(-1)
    expected = sum(logits[-3 + place, tokens[-3 + place]].item() for place in range(3))
    assert lm.loglikelihood((TEXT.removesuffix(ending), ending)) == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_scored_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="nothing stands before the text"):
        lm.loglikelihood(("", "abc"))
    with pytest.raises(ConfigError, match="nothing stands before the text"):
        lm.loglikelihood("")
    with pytest.raises(ConfigError, match=r"the continuation has \d+ tokens and the model's context 24; shorten it"):
        lm.loglikelihood(("The", TEXT))
    for text in ("", TEXT):
        with pytest.raises(ConfigError, match=r"the text has \d+ tokens?; give from one to the 24"):
            lm.logits(text)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}])
def test_it_generates_what_cda_sample_writes(run: Path, lm: LanguageModel, options: dict[str, float]) -> None:
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run_cda("sample", run, "--prompt", "The ", "--max-new-tokens", "40", "--seed", "3", *flags, "--json")
    assert result.code == 0, result.err
    written = json.loads(result.out)["samples"][0]["text"]
    assert written
    assert lm.generate("The ", 40, seed=3, **options) == written  # type: ignore[arg-type]


def test_what_cannot_be_generated_is_refused(lm: LanguageModel) -> None:
    assert lm.generate("The ", 0) == ""
    for prompt, settings in (("", {}), (TEXT, {}), ("a", {"temperature": math.nan}), ("a", {"max_new_tokens": -1})):
        with pytest.raises(ConfigError):
            lm.generate(prompt, **settings)


def test_what_cannot_be_loaded_is_refused(run: Path, tmp_path: Path) -> None:
    for path, options in ((tmp_path, {}), (tmp_path / "nothing", {}), (locate(run), {"best": True})):
        with pytest.raises(CheckpointError):
            cda_cli.load(path, **options)
    with pytest.raises(DeviceError):
        cda_cli.load(run, device="abacus")
    with pytest.raises(ConfigError):
        cda_cli.load(run, dtype="int8")  # type: ignore[arg-type]


def test_importing_the_package_imports_no_torch() -> None:
    script = "import sys; before = set(sys.modules); import cda_cli; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "cda_cli.version" in loaded
    assert all(name.partition(".")[0] in {"cda_cli", *sys.stdlib_module_names} for name in loaded)
    assert len(loaded) < 40
