"""What the table of settings says of a setting, and the class of a section of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from pydantic import BaseModel as Table  # tells a type checker which arguments a section of the configuration takes
else:
    Table = object

__all__ = ["Setting", "Table"]


@dataclass(frozen=True)
class Setting:
    """What the table says of a setting besides its type and its default.

    `flag` is its option of `cda train`, such as "--attn-k", or "--compile/--no-compile" for a switch, and `short` the
    same in one letter. Two settings may share a flag, which then sets both; the first of them describes it, with
    `flag_help`. `by_preset` says that the presets differ in a setting that has a flag.
    """

    help: str
    flag: str = ""
    short: str = ""
    flag_help: str = ""
    by_preset: bool = False
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    @property
    def parameter(self) -> str:
        """The name of the parameter that holds the value of the flag."""
        return self.flag.partition("/")[0].removeprefix("--").replace("-", "_")

    # pydantic reads the limits by the protocol of annotated_types.GroupedMetadata.
    __is_annotated_types_grouped_metadata__: ClassVar[Literal[True]] = True

    def __iter__(self) -> Iterator[object]:
        from pydantic import Field

        return iter(Field(gt=self.gt, ge=self.ge, lt=self.lt, le=self.le).metadata)
