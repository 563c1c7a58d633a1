"""What all sections of configuration files are made of: their base class, and the types of their values."""

from __future__ import annotations

import re
import typing
from fractions import Fraction
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, field docstrings kept as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _boolean_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1: `steps: true` would train one step
        if isinstance(value, bool) and info.field_name is not None:
            types = _plain_types(cls.model_fields[info.field_name].annotation)
            if bool not in types and types & {int, float}:
                raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


def _plain_types(annotation: Any) -> set[Any]:
    arguments = typing.get_args(annotation)
    return set().union(*map(_plain_types, arguments)) if arguments else {annotation}


_RATIO = re.compile(r"[-+]?[0-9]{0,40}(/[0-9]{1,40}|(\.[0-9]{0,40})?([eE][-+]?[0-9]{1,2})?)", re.ASCII)


def parse_ratio(value: Any) -> Fraction:
    """An exact rational from `"1/3"`, `0.337` (337/1000, by its decimal digits) or an integer."""
    if isinstance(value, Fraction):
        ratio = value
    elif isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f'expected a ratio such as "1/3" or 0.337, got {value!r}')
    else:
        if isinstance(value, str) and not _RATIO.fullmatch(value.replace(" ", "")):
            raise ValueError(f'expected a ratio such as "1/3" or 0.337, of at most 40 digits, got {value[:60]!r}')
        try:
            # repr gives the shortest decimal that names the float: the number that the user typed
            ratio = Fraction(value.replace(" ", "") if isinstance(value, str) else repr(value))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f'expected a ratio such as "1/3" or 0.337, got {value!r}') from None
    if not 0 <= ratio <= 1:
        raise ValueError(f"a ratio lies between 0 and 1, got {value}")
    return ratio


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def _on_a_disk(value: str) -> str:
    if _SCHEME.match(value):
        raise ValueError("expected a path on a disk, not one in object storage; copy it to a disk first")
    return value


DiskPath = Annotated[str, AfterValidator(_on_a_disk)]
"""A path that nothing reads from object storage: with a scheme it would be taken for a folder named `s3:`."""
Ratio = Annotated[Fraction, BeforeValidator(parse_ratio), PlainSerializer(str, return_type=str)]
LARGEST = 2**31 - 1
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
Amount = Annotated[int, Field(ge=1, le=2**60)]
"""Of tokens or bytes."""
Seed = Annotated[int, Field(ge=0, le=2**63 - 2**32)]
"""Ranks and stages add small numbers to it."""
