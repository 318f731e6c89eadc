"""Reads YAML without its surprises: a scalar is the text that was written, or null, and a key is given once.

YAML 1.1 reads 010 as eight, 1:30 as ninety, `on` as true and a path such as 2024-01-01 as a date, and of two equal keys
it drops the first. Here the setting decides what its text means (see `config`).
"""

from __future__ import annotations

from typing import Any

import yaml

TEXT, NULL, MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "null", "merge"))
KINDS = (TEXT, NULL, "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", None)  # None: all others, which are refused

NULLS = ("", "~", "null", "Null", "NULL")


class DuplicateKeyError(yaml.YAMLError):
    """A mapping gives a key twice."""


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (NULL, MERGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {kind: yaml.SafeLoader.yaml_constructors[kind] for kind in KINDS}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise DuplicateKeyError(
                        f"{key.value!r} is given in line {lines[key.value]} and again in line {line}"
                    )
                lines[key.value] = line
        return node


def loads(text: str) -> Any:
    """Reads the document in `text` as mappings, lists, text and None. Raises yaml.YAMLError."""
    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
