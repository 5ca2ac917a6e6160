"""Data to JSON and back: cattrs for declared types, and the checks that keep a value storable as jsonb."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin
from uuid import UUID

import cattrs
from cattrs.preconf.json import make_converter

from ._errors import InvalidData, shown

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check_type", "encode", "encode_untyped", "from_json", "read_json", "to_json"]

_converter = make_converter()


def _strictly(type_: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is type_:
            return value
        if type_ is float and type(value) is int:
            return float(value)  # raises OverflowError beyond a double's range
        raise TypeError(f"expected {type_.__name__}, not {type(value).__name__}")

    return structure


# cattrs converts ("None" from null, 1 from 1.9): what does not fit must fail instead.
for _type in (str, int, float, bool):
    _converter.register_structure_hook(_type, _strictly(_type))


def _is_keyed_by_number(type_: Any) -> bool:
    origin: Any = get_origin(type_)
    return origin is dict and get_args(type_)[0] in (int, float, bool)


@_converter.register_structure_hook_factory(_is_keyed_by_number)
def _keyed_by_number(type_: Any) -> Callable[[Any, Any], Any]:
    """JSON's keys are texts: those of a dict[int, X] are read as JSON themselves."""
    key, value = get_args(type_)
    by_text = _converter.get_structure_hook(dict[str, value])  # type: ignore[valid-type]
    return lambda plain, _: {
        _converter.structure(json.loads(text), key): item
        for text, item in by_text(plain, dict[str, value]).items()  # type: ignore[valid-type]
    }


_converter.register_unstructure_hook(UUID, str)
_converter.register_structure_hook(UUID, lambda value, _: value if isinstance(value, UUID) else UUID(value))


# Made once: json.dumps() makes an encoder for every call that has options.
_write = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def to_json(value: Any) -> str:
    """Write plain JSON data as text that jsonb takes. Raises ``InvalidData`` for NaN, infinities, NUL, lone surrogates."""
    try:
        if type(value) is int:
            return str(value)  # in a tenth of the time
        text = _write(value)
        text.encode()
    except UnicodeEncodeError:
        raise InvalidData("text with lone surrogates cannot be stored: replace or remove them") from None
    except RecursionError:
        raise InvalidData("data is nested too deeply, or contains itself") from None
    except (TypeError, ValueError) as error:
        raise InvalidData(f"data is not JSON: {error}") from None
    if "\\u0000" in text and "\\u0000" in text.replace("\\\\", ""):
        raise InvalidData("text with NUL characters cannot be stored: remove them, or encode the bytes as base64")
    return text


def encode(value: Any, type_: Any) -> str:
    """Write a value of a declared type as JSON text. Raises ``InvalidData`` if it is not of that type or not JSON."""
    if type_ in _PLAIN:
        if type_ is not Any and type(value) is not type_:
            if not (type_ is float and type(value) is int):
                raise InvalidData(f"expected {_name(type_)}, not {_name(type(value))}: {shown(value)}")
            from_json(value, type_)  # it may be beyond a double's range
        return to_json(value)
    try:
        plain = _unstructure(type_)(value)
    except RecursionError:
        raise InvalidData("data is nested too deeply, or contains itself") from None
    except Exception as error:
        raise InvalidData(f"expected {_name(type_)}, not {_name(type(value))}: {error}") from None
    text = to_json(plain)
    from_json(read_json(text), type_)  # a field may have a value of another type, and a dict be fine for a TypedDict
    return text


def encode_untyped(value: Any) -> str:
    """Write a value whose type nobody has declared: JSON, or what cattrs turns into it, by the classes it is made of."""
    try:
        plain = _converter.unstructure(value)
    except RecursionError:
        raise InvalidData("data is nested too deeply, or contains itself") from None
    except Exception as error:
        raise InvalidData(f"{_name(type(value))} cannot be turned into JSON: {error}") from None
    return to_json(plain)


_raw_decode = json.JSONDecoder().raw_decode  # without json.loads()'s search for blanks: jsonb has none around it


def _read_plainly(text: str) -> Any:
    return _raw_decode(text)[0]


try:
    from msgspec import MsgspecError
    from msgspec.json import decode as _read_fast
except ImportError:
    _read = _read_plainly
else:

    def _read(text: str) -> Any:
        try:
            return _read_fast(text)
        except MsgspecError:  # a number that is beyond a double's range
            return _read_plainly(text)


def read_json(text: str | None) -> Any:
    """Read what the server wrote of a jsonb value. Raises ``InvalidData`` if it is nested too deeply, or a number has more
    digits than Python reads.

    With msgspec, if that is installed: large data takes it a third of the time. What is written is not left to it, since it
    takes more than JSON has: it writes NaN as null.
    """
    try:
        return None if text is None else _read(text)
    except RecursionError:
        raise InvalidData("data is nested too deeply") from None
    except ValueError as error:
        raise InvalidData(f"data cannot be read: {error}") from None


def from_json(plain: Any, type_: Any) -> Any:
    """Turn plain JSON data into a value of a declared type. Raises ``InvalidData`` with "reason @ $.path" lines."""
    if type_ is Any:
        return plain
    if type_ in _PLAIN:
        if type(plain) is type_:
            return plain
        if type_ is float and type(plain) is int:
            try:
                return float(plain)
            except OverflowError:
                raise InvalidData("not float", ("a number beyond a double's range @ $",)) from None
        raise InvalidData(f"not {_name(type_)}", (f"invalid type, expected {_name(type_)} @ $",))
    try:
        return _structure(type_)(plain)
    except Exception as error:
        reasons = cattrs.transform_error(error, path="$")
        raise InvalidData(f"not {_name(type_)}", tuple(reasons)) from error


_PLAIN = {Any, str, int, float, bool, dict, list, type(None)}


@lru_cache(maxsize=1024)
def _structure(type_: Any) -> Any:
    hook = _converter.get_structure_hook(type_)
    return lambda plain: hook(plain, type_)


@lru_cache(maxsize=1024)
def _unstructure(type_: Any) -> Any:
    return _converter.get_unstructure_hook(type_)


def check_type(type_: Any) -> None:
    """Raise ``InvalidData`` if cattrs cannot read and write a type, when it is declared rather than when it is used."""
    if (
        not isinstance(type_, type)
        and get_origin(type_) is None
        and not hasattr(type_, "__supertype__")
        and type_ is not Any
    ):
        raise InvalidData(
            f"{shown(type_)} is not a type: give a class, a type such as list[int], or leave it out for any JSON"
        )
    if type_ in _PLAIN:
        return
    try:
        _structure(type_)
        _unstructure(type_)
    except Exception as error:
        raise InvalidData(f"{_name(type_)} cannot be turned into JSON and back: {error}") from error


def _name(type_: Any) -> str:
    return cast("str", getattr(type_, "__qualname__", None) or str(type_))
