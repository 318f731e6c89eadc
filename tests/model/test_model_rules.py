"""The attention rules."""

from __future__ import annotations

from typing import get_args

from cda_cli.config import ModelConfig
from cda_cli.model.rules import RULES


def test_every_rule_of_the_configuration_is_there() -> None:
    """A name without a rule is a KeyError in the middle of a run, and a rule without a name can never be chosen."""
    assert set(RULES) == set(get_args(ModelConfig.model_fields["attention"].annotation))
