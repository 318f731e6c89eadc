"""A model as lm-evaluation-harness knows one, without conversion. Importing this module imports lm_eval.

    lm_eval.simple_evaluate(model=HarnessModel(Scorer(*restore_on(...))), tasks=[...])

Requests are tokenized, cut and scored as its model `hf` does with the folder that `cda export` writes; but no special
token is read out of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from cda_cli.errors import ConfigError
from cda_cli.evaluation.tasks.base import Scorer
from cda_cli.generation import Generation, Request, SamplingSettings
from cda_cli.generation.stop_strings import StopStrings

HarnessPair = tuple[Any, list[int], list[int]]  # the texts, or None, and the tokens of context and continuation
NEUTRAL = {"num_beams": 1, "no_repeat_ngram_size": 0}  # values with which an option of transformers does nothing


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """`name` is what the progress is shown under. `truncated` counts the requests whose context was too long."""

    def __init__(self, scorer: Scorer, name: str = "") -> None:
        super().__init__()
        self._scorer, self._name = scorer, name
        self._tokenizer = scorer.restored.tokenizer
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.separator

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.prefix

    @property
    def max_length(self) -> int:
        return self._scorer.restored.config.model.seq_len

    @property
    def max_gen_toks(self) -> int:
        """The most new tokens where a task gives no number, as in `hf`."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return f"{self._tokenizer.name}-{self._tokenizer.fingerprint}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises ConfigError: no tokenizer of a run has a chat template."""
        raise ConfigError("the tokenizer of a run has no chat template; evaluate without --apply_chat_template")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        beginning = self._tokenizer.beginning.ids.tolist() if add_special_tokens in (None, True) else []
        return [*beginning, *self._tokenizer.encode(string).tolist()]

    def _loglikelihood_tokens(self, requests: Sequence[HarnessPair], **kwargs: Any) -> list[tuple[float, bool]]:
        scored = self._scorer.loglikelihoods(self._name, [(context, tokens) for _, context, tokens in requests])
        self.truncated += sum(one.is_truncated for one in scored)
        return [(one.nats, one.is_greedy) for one in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores each text in windows of the model's context that do not overlap, after the prefix token."""
        pairs: list[HarnessPair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs += [(None, *utils.make_disjoint_window(window)) for window in windows]
            owners += [owner] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until a stop string, the separator, or the number of tokens of the task."""
        advance, done = self._scorer.progress(self._name, len(requests)), 0
        asked, untils = [], []
        for seed, request in enumerate(requests):
            context, options = request.args
            one, until = self._request(context, options, seed)
            asked.append(one)
            untils.append(until)
        generation = Generation(
            self._scorer.restored.model,
            asked,
            batch_size=self._scorer.batch_size,
            dtype=self._scorer.dtype,
            end_tokens=(self.eot_token_id,),
        )
        texts = [""] * len(asked)
        decoders = [self._tokenizer.stream() for _ in asked]
        stops = [StopStrings(until) for until in untils]
        for generated in generation:
            number = generated.request
            piece = decoders[number].push(generated.token)
            texts[number] += piece
            stops[number].push(piece)
            if stops[number].found is not None:
                generation.end(number)
            advance(len(generation.reasons) - done)
            done = len(generation.reasons)
        advance(len(requests) - done)
        whole = [text + decoder.flush() for text, decoder in zip(texts, decoders, strict=True)]
        return [str(postprocess_generated_text(text, until, None)) for text, until in zip(whole, untils, strict=True)]

    def _request(self, context: str, options: dict[str, Any], seed: int) -> tuple[Request, list[str]]:
        """Reads what a task asks for: the request, and its stop strings."""
        chosen: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        until, most = chosen.pop("until"), chosen.pop("max_gen_toks")
        room = self.max_length - most
        if room < 1:
            raise ConfigError(
                f"the task {self._name} takes up to {most} new tokens, and the model's context is {self.max_length}; "
                "set a smaller generation_kwargs.max_gen_toks in the YAML of the task"
            )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(prompt) > room
        return Request(prompt[-room:], most, self._settings(chosen), seed), [stop for stop in until if stop]

    def _settings(self, chosen: dict[str, Any]) -> SamplingSettings:
        """Reads what a task says of sampling. Raises ConfigError for what generation here does not have."""
        samples = chosen.pop("do_sample") and chosen.get("temperature")
        given = {name: chosen.pop(name) for name in SamplingSettings._fields if chosen.get(name) is not None}
        unknown = [name for name, value in chosen.items() if value is not None and value != NEUTRAL.get(name)]
        if unknown:
            raise ConfigError(
                f"the task {self._name} generates with {unknown[0]}={chosen[unknown[0]]!r}, which cda does not have; "
                "leave it out of the generation_kwargs of the task"
            )
        if not given.get("top_k", True):
            del given["top_k"]  # 0 keeps all
        return SamplingSettings(**given | {"temperature": given.get("temperature", 0.0) if samples else 0.0})
