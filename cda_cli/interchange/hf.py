"""The model as transformers knows it. Importing this module registers it with AutoConfig and AutoModelForCausalLM.

A folder of `cda export` then loads without trust_remote_code. This needs transformers 5.4 or later, the extra `hf`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cda_cli.config import ModelConfig, parse
from cda_cli.errors import ConfigError, brief
from cda_cli.interchange.hf_files import AUTO_MAP, MODEL_TYPE, write_remote_code
from cda_cli.model import KeyValueCache, Transformer
from cda_cli.model.transformer import WITH_BUFFERS

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache, DynamicCache
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils.generic import can_return_tuple
except ImportError as error:  # transformers 4 has no PreTrainedConfig
    raise ConfigError(
        f"cda_cli.interchange.hf needs transformers 5.4 or later ({brief(error)}); install it "
        "(pip install --upgrade transformers)"
    ) from error

# The name of the cache among the outputs.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class CdaConfig(PreTrainedConfig):  # type: ignore[misc]
    """`settings` are those of the section `model`, and `attention_eps` is the ε of the saved step, if it anneals."""

    model_type = MODEL_TYPE

    def __init__(
        self, settings: dict[str, Any] | None = None, attention_eps: float | None = None, **kwargs: Any
    ) -> None:
        self.settings, self.attention_eps = settings, attention_eps
        super().__init__(**{"auto_map": AUTO_MAP} | kwargs)

    @property
    def model(self) -> ModelConfig:
        return parse({"model": self.settings or {}}).model

    # The names that transformers and the tools around it look for.
    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        return self.model.seq_len

    @property
    def hidden_size(self) -> int:
        return self.model.dim

    @property
    def num_hidden_layers(self) -> int:
        return self.model.depth

    @property
    def num_attention_heads(self) -> int:
        return self.model.heads

    @property
    def head_dim(self) -> int:
        return self.model.head_width

    @property
    def tie_word_embeddings(self) -> bool:
        return self.model.tied_embeddings

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(Path(save_directory))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing. transformers would copy the source of this module into each folder that it saves."""


class TransformersCache(KeyValueCache):
    """A cache of transformers, as our layers use one. It may be of any kind that keeps all positions."""

    length: int

    def __init__(self, inner: Cache) -> None:
        self.inner = inner
        self.length = int(inner.get_seq_length())

    def append(self, layer: int, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        stop = self.length + key_BHTD.shape[2]
        key, value = self.inner.update(key_BHTD, value_BHTD, layer)
        return key[:, :, :stop], value[:, :, :stop]  # A static cache returns all its room.


class CdaForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """`Transformer` as a causal language model of transformers."""

    config_class = CdaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"model.to_logits.weight": "model.token_embedding.weight"}  # noqa: RUF012

    def __init__(self, config: CdaConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.model)
        if config.attention_eps is not None:
            self.model.set_attention_eps(config.attention_eps)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Fills the buffers that no file holds. The weights are as `Transformer` draws them, or are loaded."""
        if isinstance(module, WITH_BUFFERS):
            module.fill_buffers()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns the logits [B, T, V] of input_ids [B, T], and with `labels` [B, T] the mean loss of the next tokens.

        `cache` was `past_key_values` before transformers 5.24. `attention_mask` [B, S] covers the cached positions too.
        Its zeros may stand in front of a row or behind it. `labels` of −100 count as nothing. `logits_to_keep` is as in
        the models of transformers.

        Raises ValueError for a mask with zeros elsewhere, and for positions or embeddings of one's own.
        """
        for name in ("position_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                raise ValueError(f"this model takes no {name}; leave them out, as they follow from the other inputs")
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        ours = TransformersCache(cache) if cache is not None else None
        logits = self.model(input_ids, ours, padding_B=left_padding(attention_mask))
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = logits[:, keep]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Keeps the mask [B, S] of `generate`, from which transformers would make one for its own attention."""
        return attention_mask

    def get_input_embeddings(self) -> nn.Module:
        return self.model.token_embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.to_logits

    def _set_gradient_checkpointing(self, enable: bool = True, **_: Any) -> None:
        self.model.activation_checkpointing = enable

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing, as in `CdaConfig`."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it looks at numbers, which no tracer has
def left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """Returns the number of zeros in front of each row of a mask [B, S], or None where nothing is hidden.

    Zeros behind a row need nothing, as no token sees a later one. Raises ValueError for zeros between ones.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"an attention mask is [batch, positions] for this model, not {tuple(attention_mask.shape)}")
    seen = attention_mask.bool()
    padding_B = (seen.cumsum(1) == 0).sum(1)
    place = torch.arange(1, seen.shape[1] + 1, device=seen.device)
    if bool((seen & (seen.cumsum(1) != place - padding_B.unsqueeze(1))).any()):
        raise ValueError("the attention mask hides tokens within a row; pad only in front of a row, or behind it")
    return padding_B


AutoConfig.register(MODEL_TYPE, CdaConfig, exist_ok=True)
AutoModelForCausalLM.register(CdaConfig, CdaForCausalLM, exist_ok=True)
