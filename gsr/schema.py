"""Sections of a config: what a key may be, and one sentence for every mistake in a file.

A section is a pydantic model. `from_dict` builds one from the mapping of a YAML or JSON file, and
names all mistakes at once, each with its full key and, where there is one, the nearest right name.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from inspect import Parameter, Signature
from typing import Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gsr.errors import InputError
from gsr.io.yaml import parse_yaml

IMPORT_PATH = r"[^\W\d]\w*(\.[^\W\d]\w*)+"  # module.Name


class _Unvalidated(type(BaseModel)):
    """Makes Section(...) set fields as a dataclass does; validation does not come through here."""

    def __call__(cls: Any, *values: Any, **named: Any) -> Any:
        own = named if cls.model_config["extra"] == "allow" else {}
        names = dict.fromkeys([*cls.model_fields, *own])
        fields = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        return cls.model_construct(**Signature(fields).bind_partial(*values, **named).arguments)


class Section(BaseModel, metaclass=_Unvalidated):
    """Base of all sections: strict types, finite numbers, no unknown keys."""

    # Defaults are validated too: a limit may depend on keys that are not left out.
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_empty(cls, mapping: Any) -> Any:
        return {} if mapping is None else mapping  # `train:` with nothing below it


class Part(Section):
    """Code by name, with keyword arguments for it as further keys; text is a name without any."""

    model_config = ConfigDict(extra="allow")
    name: str = Field("", description="built-in, or module.Name; unknown keys are its arguments")

    @model_validator(mode="before")
    @classmethod
    def _text_is_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def keys(self) -> dict[str, Any]:
        """The keyword arguments."""
        return dict(self.model_extra or {})


def key(default: Any, description: str, **limits: Any) -> Any:
    """A field with a description; `limits` are those of pydantic's Field."""
    return Field(default, description=description, **limits)


def must(text: str, holds: Callable[[Any, dict], Any], blame: str = "") -> AfterValidator:
    """A limit that Field has no word for: holds(value, {field above this one: its value}).

    It is skipped if a field that it reads is wrong itself. `blame` is the key at fault where that
    is another one; it starts in this section, such as "bank.channels".
    """

    def validate(value: Any, info: Any) -> Any:
        try:
            good = holds(value, info.data)
        except KeyError:  # suppress follow-on errors
            return value
        if good:
            return value
        first, *below = (blame or info.field_name).split(".")
        wrong = functools.reduce(getattr, below, {**info.data, info.field_name: value}[first])
        raise ValueError(text, blame, wrong)

    return AfterValidator(validate)


def is_import_path(name: str) -> bool:
    """Whether a name is `module.Name`, rather than that of a built-in part."""
    return re.fullmatch(IMPORT_PATH, name) is not None


def one_of(*names: str) -> AfterValidator:
    """The name of a part: a built-in one, where there are any, or an import path."""
    text = f"one of {', '.join(names)} or " if names else ""
    text += "an import path such as my_module.Name"
    return must(text, lambda name, _: name in names or is_import_path(name))


# ---- loading ------------------------------------------------------------------------------------

S = TypeVar("S", bound=Section)


def to_dict(config: Section) -> dict[str, Any]:
    """Return a config or a section of one as plain dictionaries and lists; undoes `from_dict`."""
    # A value of a wrong type is for `check` to refuse.
    return config.model_dump(warnings=False, serialize_as_any=True)


def from_dict(cls: type[S], mapping: Any, where: str = "") -> S:
    """Build the section `cls` from a mapping as a YAML or JSON file gives it.

    Keys left out take their defaults; a section that is null takes all of them. `where` is put
    before every key in messages, such as "model". Raises one InputError that lists every mistake:
    unknown keys with the nearest known one, values of the wrong type and values out of range.
    """
    return build(cls, mapping, where, [])


def check(config: S) -> S:
    """Return a copy of a config, or of a section of one, that keeps to every type and limit.

    For configs that were not read by `from_dict`. Raises InputError as that does.
    """
    return from_dict(type(config), to_dict(config))


def build(cls: type[S], mapping: Any, where: str, mistakes: list[str], prefix: str = "") -> S:
    """Validate a mapping; raise InputError for its mistakes and for those found before."""
    try:
        config = cls.model_validate(mapping)
    except ValidationError as error:
        mistakes = [*mistakes, *_mistakes(cls, error, where)]
    else:
        if not mistakes:
            return config
    if len(mistakes) == 1:
        raise InputError(prefix + mistakes[0])
    raise InputError("\n  ".join([f"{prefix}{len(mistakes)} mistakes", *mistakes]))


def override(cls: type[Section], mapping: Any, text: str) -> str | None:
    """Put an override such as "train.lr=2e-4" into a mapping, or return what is wrong with it."""
    full, equals, value = text.partition("=")
    *sections, last = full.split(".")
    if not equals or not all(full.split(".")):
        return f"override {text!r} must read section.key=value"
    try:
        value = parse_yaml(value, f"override {text!r}")
    except InputError as error:
        return str(error)
    known = _fields(cls)
    for where, section in zip(
        itertools.accumulate(sections, "{}.{}".format), sections, strict=True
    ):
        if where in known and not _is_section(known[where]):
            return f"{full} is not a key; {where} is a value, not a section"
        if isinstance(mapping, dict):
            below = mapping.get(section)
            named = {"name": below} if isinstance(below, str) and f"{where}.name" in known else None
            mapping[section] = named or ({} if below is None else below)
            mapping = mapping[section]
    if isinstance(mapping, dict):  # else the file has a value there, which validation reports
        mapping[last] = value
    return None


# ---- messages -----------------------------------------------------------------------------------

MUST_BE = {  # by the type of pydantic's error
    "int_type": "a whole number", "float_type": "a finite number", "bool_type": "true or false",
    "string_type": "text", "list_type": "a list", "dict_type": "a section",
    "model_type": "a section of keys", "literal_error": "one of {expected}",
    "greater_than": "above {gt:.15g}", "greater_than_equal": "at least {ge:.15g}",
    "less_than": "below {lt:.15g}", "less_than_equal": "at most {le:.15g}",
    "multiple_of": "a multiple of {multiple_of}", "finite_number": "a finite number",
    "too_short": "at least {min_length} long", "too_long": "at most {max_length} long",
    "value_error": "{error.args[0]}",  # see `must`
}  # fmt: skip


def _is_section(kind: Any) -> bool:
    return isinstance(kind, _Unvalidated)


def _fields(cls: type[Section], where: str = "") -> dict[str, Any]:
    """{key in full: type, null apart} of a section and of those below it."""
    fields: dict[str, Any] = {}
    kind: Any
    for name, field in cls.model_fields.items():
        kinds = [k for k in get_args(field.annotation) if _is_section(k)]  # a section or null
        fields[_join(where, name)] = kind = (*kinds, field.annotation)[0]
        if _is_section(kind):
            fields |= _fields(kind, _join(where, name))
    return fields


def _join(where: str, *names: str | int) -> str:
    """The full name of a key, such as model.encoder.depths[2]."""
    parts = (f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
    return (where + "".join(parts)).removeprefix(".")


def _mistakes(cls: type[Section], error: ValidationError, where: str) -> Iterator[str]:
    """Say in one sentence each what pydantic found wrong."""
    known = list(_fields(cls, where))
    for e in error.errors(include_url=False):
        path, value = [name for name in e["loc"] if name != "[key]"], e["input"]
        if e["type"] in ("extra_forbidden", "invalid_key"):
            yield _unknown(str(path.pop()), _join(where, *path), known)
            continue
        context = e.get("ctx", {})
        if e["type"] == "value_error" and context["error"].args[1]:  # what `must` blames
            path[-1], value = context["error"].args[1:]
        text = MUST_BE.get(e["type"], "of another type").format(**context).replace("'", "")
        hint = ""
        if text == "text" and isinstance(value, (int, float)):
            hint = "; put it in quotes"
        elif text.startswith("one of"):
            close = difflib.get_close_matches(str(value), re.findall(r"\w+", text), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
        yield f"{_join(where, *path) or 'the config'} must be {text}, not {_show(value)}{hint}"


def _unknown(name: str, where: str, known: list[str]) -> str:
    """Say which key was meant: one of this section, one of that name elsewhere, or any."""
    own = [full.rpartition(".")[2] for full in known if full.rpartition(".")[0] == where]
    elsewhere = {full.rpartition(".")[2]: full for full in reversed(known)}
    if match := difflib.get_close_matches(name, own, 1):
        meant = f"did you mean {_join(where, match[0])}?"
    elif match := difflib.get_close_matches(name.rpartition(".")[2], elsewhere, 1, 0.75):
        meant = f"did you mean {elsewhere[match[0]]}?"
    else:
        meant = f"{where or 'the top level'} knows {', '.join(own)}"
    return f"{_join(where, name)} is not a key; {meant}"


def _show(value: Any) -> str:
    """A value of a file as messages call it."""
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
