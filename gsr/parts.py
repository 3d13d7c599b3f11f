"""Code that a config names: a built-in part, or `module.Name` of a module of one's own.

The module may lie in the folder that a command is started in, or wherever Python finds modules.
Importing it runs it: what a downloaded file names is therefore never imported here
(`gsr.models.registry.check_imported`), while a config that a user trains with is the user's own.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gsr.errors import InputError


def import_own(module: str, key: str) -> Any:
    """Import a user's module; InputError, which starts with `key`, if it cannot be imported."""
    if os.getcwd() not in sys.path:  # a script has its own folder there instead
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{key}: {module} cannot be imported ({error}): start in the folder that holds it, or "
            "put that folder into PYTHONPATH"
        ) from None


def find(name: str, builtin: Mapping[str, str], key: str) -> Any:
    """What a part's name means.

    Args:
        name: built-in, or module.Name.
        builtin: {name: module.Name}.
        key: of the config, for messages.

    Raises:
        InputError: the module cannot be imported, or has nothing of that name.
    """
    module, _, attribute = builtin.get(name, name).rpartition(".")
    module = import_own(module, key)
    if not hasattr(module, attribute):
        close = difflib.get_close_matches(attribute, vars(module), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"{key}: {module.__name__} has no {attribute}{hint}")
    return getattr(module, attribute)


def check_keys(part: Any, given: Sequence[Any], keys: Mapping[str, Any], key: str) -> None:
    """Raise InputError, which starts with `key`, unless a class or function takes these keys.

    `given` stands for what it is called with besides.
    """
    if not callable(part):
        raise InputError(f"{key} is {type(part).__name__}; it must be a class or a function")
    try:
        signature = inspect.signature(part)
    except ValueError:  # some of what is written in C has none
        return
    try:
        signature.bind(*given, **keys)
    except TypeError as error:
        raise InputError(f"{key} cannot take its keys: {error}") from None


def make(part: Any, given: Sequence[Any], keys: Mapping[str, Any], key: str) -> Any:
    """Call a class or function; InputError as `check_keys`."""
    check_keys(part, given, keys, key)
    return part(*given, **keys)
