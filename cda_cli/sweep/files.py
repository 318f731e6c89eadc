"""Reads the file of a sweep (docs/sweeps.md), with what it takes from another, its reduced form, and `--set`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cda_cli.config import read_set, read_yaml
from cda_cli.errors import ConfigError, did_you_mean, requirement
from cda_cli.sweep.spec import PARTS, Spec, merged, settings

EXTENDS, REDUCED = "extends", "reduced"  # keys that say how the rest of the file comes about

ONE_OF = {"arms": "arm", "grid": "setting with the values to try", "seeds": "seed"}  # what must not be empty holds


def read_spec(file: Path, *, reduced: bool = False, sets: Sequence[str] = ()) -> Spec:
    """Reads the file of a sweep, and checks the settings of each arm. Raises ConfigError, which names file and key.

    `reduced` takes the changes of its key of that name too, and `sets` are lines of `--set`, for all arms.
    """
    values = _read(file)
    smaller = values.pop(REDUCED, None)
    if reduced:
        if not isinstance(smaller, dict):
            raise ConfigError(f"{file} has no reduced form; give it the key {REDUCED}, or leave --reduced out")
        values = merged(values, smaller)
    for line in sets:
        values = merged(values, read_set(line))
    try:
        spec = Spec.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{file}: {_sentence(error)}") from error
    for name, arm in spec.arms.items():
        try:
            settings(spec, *spec.layers(name))
        except ConfigError as error:
            place = "" if _is_of_all_arms(spec, str(error)) else f"arms.{name}: "
            raise ConfigError(f"{file}: {place}{error}") from error
        for point in spec.points(name):
            try:
                settings(spec, *spec.layers(name), point.layer)
            except ConfigError as error:
                raise ConfigError(f"{file}: {f'arms.{name}.' if arm.grid else 'tune.'}grid: {error}") from error
    return spec


def _read(file: Path, extended: Sequence[Path] = ()) -> dict[str, Any]:
    """The values of a file, above those of the file that it extends. It is itself `extended` by others."""
    if not file.exists():
        asked = f", which {extended[-1]} extends" if extended else ""
        raise ConfigError(f"there is no file {file}{asked}; give the YAML file of a sweep, as docs/sweeps.md shows one")
    if file.resolve() in [other.resolve() for other in extended]:
        raise ConfigError(f"{file} extends itself; leave its key {EXTENDS} out")
    values = read_yaml(file, "mend it, or give another file")
    name = values.pop(EXTENDS, None)
    return merged(_read(file.parent / str(name), [*extended, file]), values) if name else values


def _is_of_all_arms(spec: Spec, fault: str) -> bool:
    """Whether the settings of all arms are refused in the same words without those of any arm."""
    try:
        settings(spec)
    except ConfigError as error:
        return str(error) == fault
    return False


def _sentence(error: ValidationError) -> str:
    """The first fault that pydantic found, unknown keys before others, as one sentence with the key."""
    # A key that is written wrongly is also missing, and what it says of the first helps more.
    fault = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    path = [str(part) for part in fault["loc"]]
    where, message = ".".join(path), requirement(fault["msg"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{where}': {did_you_mean(path[-1], _keys(path[0] if path[1:] else ''))}"
    if fault["type"] == "missing":
        return f"the key '{where}' is missing; docs/sweeps.md shows a whole file"
    if fault["type"] == "too_short":
        return f"{where} is empty; give at least one {ONE_OF[path[-1]]}"
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} = {fault['input']!r} is not possible: {message}; docs/sweeps.md says what is"


def _keys(name: str) -> list[str]:
    """The keys of the part `name` of the file, or of the file itself."""
    return [field.alias or key for key, field in PARTS.get(name, Spec).model_fields.items()]
