"""Say in words what is wrong with a YAML file or with the fields that were read from it.

Neither pydantic nor yaml is imported here: the errors bring what is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from djinn_lib.errors import did_you_mean, first_line, shown

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from yaml import YAMLError

_KINDS = {  # the beginning of a type of pydantic's errors, and what was expected
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "fields",
    "model": "fields",
}
_BOUNDS = {  # how pydantic names bounds, and how we do
    "gt": "a number above",
    "ge": "a number of at least",
    "lt": "a number below",
    "le": "a number of at most",
}


def in_words_of_validation(error: ValidationError, model: type[BaseModel]) -> str:
    """Return a line for each fault that pydantic found, with its place as in the YAML file.

    Args:
        error: from a validation of `model`.
        model: names its fields, from which the nearest is offered for an unknown one.
    """
    return "\n".join(_line(fault, model) for fault in error.errors(include_url=False))


def in_words_of_yaml(error: YAMLError) -> str:
    """Return what a YAML parser could not read, with its line and column, and what to do."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:
        return f"it is not YAML ({problem or first_line(error)}): correct the YAML"
    begun, doing = getattr(error, "context_mark", None), getattr(error, "context", None)
    since = f" {doing}" if doing else ""
    if doing and begun and begun.line != mark.line:
        since += f" that begins in line {begun.line + 1}"
    place = f"line {mark.line + 1}, column {mark.column + 1}"
    return f"it is not YAML at {place} ({problem}{since}): correct the YAML"


def place_in_words(keys: Iterable[object]) -> str:
    """Return the place of a field: ``("cells", 0, "speed")`` gives ``"cells[0].speed"``."""
    place = ""
    for key in keys:
        if isinstance(key, int):
            place += f"[{key}]"
        else:
            name = key if re.fullmatch(r"[\w-]+", str(key)) else shown(key)
            place += f".{name}" if place else f"{name}"
    return place


def _line(fault: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Return one fault as a line: its place, what was expected, what was given."""
    is_name = fault["loc"][-1:] == ("[key]",)  # what is wrong is a name, not what it names
    keys, names = _follow(fault["loc"][: -2 if is_name else None], model)
    given, kind, context = fault["input"], fault["type"], fault.get("ctx", {})
    if kind.startswith("union_tag"):
        keys.append(context["discriminator"].strip("'"))
        given = context.get("tag")
    place = place_in_words(keys)
    if kind in ("missing", "union_tag_not_found"):
        return f"{place} is missing: add it"
    if kind == "extra_forbidden":
        otherwise = f"choose from {', '.join(names)}" if names else "leave it out"
        longer = [name for name in names if name.startswith(f"{keys[-1]}_")]  # rate, rate_per_s
        meant = longer[0] if len(longer) == 1 else keys[-1]
        return f"{place} is an unknown field: {did_you_mean(meant, names, otherwise)}"
    before = f"{place}: " if place else ""
    if kind == "value_error":  # a sentence of ours
        return f"{before}{context['error']}"
    if is_name and kind == "string_type":
        return f"{before}the name {shown(given)} is not text: put it in quotes"
    hint = did_you_mean(given, _choices(fault), "")
    said = f"{before}expected {_expected(fault)}, got {_given(given)}"
    return f"{said}: {hint}" if hint else said


def _choices(fault: Mapping[str, Any]) -> list[str]:
    """Return the values that pydantic lists as ``'a', 'b' or 'c'``."""
    context = fault.get("ctx", {})
    return re.findall(r"'([^']*)'", context.get("expected") or context.get("expected_tags", ""))


def _expected(fault: Mapping[str, Any]) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    for bound, words in _BOUNDS.items():
        if bound in context:
            return f"{words} {context[bound]:g}"
    if choices := _choices(fault):
        return " or ".join(filter(None, (", ".join(map(repr, choices[:-1])), repr(choices[-1]))))
    if kind == "too_short":
        return f"{context['min_length']} or more entries"
    if kind == "string_too_long":
        return f"text of at most {context['max_length']} characters"
    if words := _KINDS.get(kind.split("_")[0]):
        return words
    return re.sub(r"^Input should be ", "", fault["msg"])


def _given(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case Mapping() | list():
            what = "list" if isinstance(value, list) else "mapping"
            return f"a {what}" if value else f"an empty {what}"
        case _:
            return shown(value)


def _follow(location: Sequence[Any], model: Any) -> tuple[list[Any], list[str]]:
    """Return the keys of a location, and the fields known where its last key is.

    pydantic adds the tag of a tagged union to a location, which is no key of the file.
    """
    keys: list[Any] = []
    names: list[str] = []
    at = model
    for key in location:
        members = list(_members(at))
        if len(members) > 1 and (tagged := [one for one in members if _tag(one) == key]):
            at = tagged[0]
            continue
        keys.append(key)
        at, names = _inside(members[0] if len(members) == 1 else None, key)
    return keys, names


def _inside(at: Any, key: object) -> tuple[Any, list[str]]:
    """Return the annotation of what a key leads to, and the names that it could be."""
    if hasattr(at, "model_fields"):
        field = at.model_fields.get(key)
        return field.annotation if field else None, list(at.model_fields)
    arguments = get_args(at)
    return (arguments[-1] if get_origin(at) in (dict, list) else None), []


def _members(at: Any) -> Iterator[Any]:
    """Yield the types of an annotation: of a union all but None, else itself."""
    if get_origin(at) is Annotated:
        yield from _members(get_args(at)[0])
    elif get_origin(at) in (dict, list) or hasattr(at, "model_fields"):
        yield at
    else:
        for one in get_args(at):
            yield from _members(one)


def _tag(at: Any) -> object:
    """Return the literal value of the field `kind`, by which a union is tagged, if it has one."""
    field = getattr(at, "model_fields", {}).get("kind")
    return next(iter(get_args(field.annotation)), None) if field else None
