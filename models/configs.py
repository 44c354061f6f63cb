"""What the config of a network may say: networks are built of it before anything else is known to be in order."""

import sys
from dataclasses import fields
from typing import Any, Final

_MOST: Final = {"layers": 256, "bits": 12}  # by the end of a name; published networks have 12 and 10
_MOST_ELSE: Final = 2**16
_LARGEST: Final = sys.float_info.max


def check_fields(config: Any, what: str) -> None:
    """ValueError unless the fields of a config dataclass are of their types, and its numbers are a network's."""
    for field in fields(config):
        value, name = getattr(config, field.name), f"{what} config: {field.name}"
        if field.type is int:
            whole_number(value, name)
        elif field.type is float:
            finite_number(value, name)
        elif field.type is bool and not isinstance(value, bool):
            raise ValueError(f"{name} is {shown(value)}, not true or false")


def check_heads(width: int, heads: int, what: str) -> None:
    """ValueError unless `width` splits into heads whose channels pair up, as rotary embedding needs."""
    if width % (2 * heads):
        raise ValueError(f"{what} config: {heads} heads of even width do not add up to {width}")


def whole_number(value: Any, name: str) -> int:
    """`value`; ValueError unless it is an integer from 1 to what any network has of it."""
    most = next((most for ending, most in _MOST.items() if name.endswith(ending)), _MOST_ELSE)
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} is {shown(value)}, not a whole number from 1 to {most}")
    return value


def finite_number(value: Any, name: str) -> float:
    """`value` as a float; ValueError unless it is a finite number."""
    if type(value) not in (int, float) or not -_LARGEST < value < _LARGEST:
        raise ValueError(f"{name} is {shown(value)}, not a finite number")
    return float(value)


def shown(value: Any) -> str:
    """`value` in one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
