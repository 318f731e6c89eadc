"""The model: token embeddings → blocks of attention and feed-forward → logits."""

from cda_cli.model.activations import feed_forward_activation
from cda_cli.model.active_units import reading_active_units, weights_read
from cda_cli.model.auxiliary_losses import ActivationL1, ExcessSupport
from cda_cli.model.cache import KeyValueCache, StaticCache
from cda_cli.model.context_parallel import ContextPart
from cda_cli.model.edits import Truncation, editing
from cda_cli.model.key_pages import KeyReads
from cda_cli.model.loss import padded_vocabulary
from cda_cli.model.page_choice import FIRST_AND_NEWEST, PAGE, KeySelection
from cda_cli.model.published import from_published
from cda_cli.model.rules import AttentionRule, Rows, attention_rule, model_backend
from cda_cli.model.shards import full_tensor
from cda_cli.model.transformer import (
    Transformer,
    expected_tensors,
    fits_cuda_graph,
    load_state_tensors,
    model_of_shapes,
    state_tensors,
    uses_soft_topk,
)

__all__ = [
    "FIRST_AND_NEWEST",
    "PAGE",
    "ActivationL1",
    "AttentionRule",
    "ContextPart",
    "ExcessSupport",
    "KeyReads",
    "KeySelection",
    "KeyValueCache",
    "Rows",
    "StaticCache",
    "Transformer",
    "Truncation",
    "attention_rule",
    "editing",
    "expected_tensors",
    "feed_forward_activation",
    "fits_cuda_graph",
    "from_published",
    "full_tensor",
    "load_state_tensors",
    "model_backend",
    "model_of_shapes",
    "padded_vocabulary",
    "reading_active_units",
    "state_tensors",
    "uses_soft_topk",
    "weights_read",
]
