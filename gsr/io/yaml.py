"""YAML as config files use it: version 1.2's numbers and booleans, and every key only once."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, cast

import yaml

from gsr.errors import InputError

# What a plain scalar stands for; any other is text. PyYAML itself follows YAML 1.1, which reads
# 1e-4 as text, `no` as false, 1:30 as 90 and 010 as 8.
SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)",
}


class Loader(yaml.SafeLoader):
    """Read YAML as PyYAML's safe loader does, but with `SCALARS` and every key only once."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key = cast(Any, self).construct_object(key_node, deep=True)  # PyYAML has no types
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(problem=f"line {line}: a key must be a plain word")
            if key in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"line {line}: the key {key} is there already, in line {lines[key]}"
                )
            lines[key] = line
        return super().construct_mapping(node, deep=deep)


for tag, pattern in SCALARS.items():  # the first that matches wins: an int before a float
    cast(Any, Loader).add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), None
    )


def parse_yaml(text: str, name: str) -> Any:
    """Return the content of one YAML document; InputError, which starts with `name`, if invalid."""
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{name} is not valid YAML: {line}{' '.join(problem.split())}") from None
    except (ValueError, RecursionError) as error:  # PyYAML lets these out of odd scalars
        raise InputError(f"{name} is not valid YAML ({error})") from None
