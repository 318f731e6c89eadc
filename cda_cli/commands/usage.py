"""Refuses a wrong command line with one sentence, as every other error is told."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from cda_cli.errors import UsageError, did_you_mean, requirement

# Typer has a copy of click in it, or needs click itself, and exports only one of click's errors.
click_errors: Any = sys.modules[typer.BadParameter.__module__]

NEAR = 0.6  # how much alike options must be for one to be meant: many are short, and somewhat alike


class Command(TyperCommand):
    """A command that is told by one UsageError what is wrong, also with an option that is given twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return _parse(self, super().parse_args, ctx, args)


class Group(TyperGroup):
    """`cda` itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Without a word of a command, click shows the help.
        return _parse(self, super().parse_args, ctx, args) if args else super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            raise UsageError(f"unknown command {args[0]!r}: {did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except click_errors.UsageError as error:
            raise UsageError(_sentence(error, self, ctx.command_path)) from error


def _parse(command: Any, parse: Any, ctx: Any, args: list[str]) -> list[str]:
    """`parse(ctx, args)`, of which click would take the last of two values without a word."""
    given: Mapping[str, Any] = {}
    extra: Sequence[str] = ()
    order: Sequence[Any] = ()
    try:
        # An independent reading, as click keeps neither the order nor the values of what it refuses.
        given, extra, order = command.make_parser(ctx).parse_args(list(args))
        left: list[str] = parse(ctx, args)
    except click_errors.UsageError as error:
        raise UsageError(_sentence(error, command, ctx.command_path, given, extra)) from error
    repeated = [each for each in order if order.count(each) > 1 and not getattr(each, "multiple", True)]
    if repeated and not ctx.resilient_parsing:
        name = "/".join(each for each in (*repeated[0].opts, *repeated[0].secondary_opts) if each.startswith("--"))
        raise UsageError(f"{name} is given twice; give it once")
    return left


def _sentence(
    error: Any, command: Any, path: str, given: Mapping[str, Any] = MappingProxyType({}), extra: Sequence[str] = ()
) -> str:
    see = f"see `{path} --help`"
    reason = requirement(error.message.rstrip("."))
    if isinstance(error, click_errors.NoSuchOption):
        options = [name for each in command.params for name in (*each.opts, *each.secondary_opts) if name[:2] == "--"]
        return f"unknown option {error.option_name!r}: {did_you_mean(error.option_name, options, see, NEAR)}"
    if isinstance(error, click_errors.MissingParameter):
        return f"{error.param.metavar or error.param.name} is missing; {see}"
    if isinstance(error, click_errors.BadParameter):
        option = max(error.param.opts, key=len)
        return f"{option} {given.get(error.param.name)!r} is not possible: {reason}; {see}"
    if extra:
        return f"argument {extra[0]!r} has no place here; put quotes around a value that holds spaces, or {see}"
    return f"{reason}; {see}"
