"""Objects that a configuration names: importing them, and calling them with checked arguments."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_train.config.errors import UserError, nearest
from dist_train.config.schema import Config

GIVEN = "object:"  # begins the name that stands for an object which a program gave to `fit`


def given_name(item: object) -> str:
    """What a configuration calls an object that no file holds: `import_object` refuses it."""
    return f"{GIVEN}{type(item).__module__}.{type(item).__qualname__}"


def with_given(config: Config, **given: Any) -> Config:
    """`config` that says which objects a program gave (by section), instead of naming what is not used."""
    for section, item in given.items():
        if item is not None:
            config = replace(config, **{section: replace(getattr(config, section), name=given_name(item))})
    return config


def import_object(name: str, key: str) -> Any:
    """The object that `package.module:object` names; the current folder is searched too."""
    if GIVEN in name:
        argument = {"model.name": "model=...", "task.name": "task=..."}.get(
            key, "train_data=... or eval_data=..."
        )
        raise UserError(
            f"{key}: it was a '{name.partition(GIVEN)[2]}' that a program gave to `fit`, and no file holds"
            f" it: give it again, from Python, as {argument} of fit, load_model, predict or evaluate_run."
        )
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: there is no module '{error.name}', asked for as '{name}'.") from None
    try:
        return getattr(module, attribute)
    except AttributeError:
        near = nearest(attribute, vars(module))
        raise UserError(f"{key}: module '{module_name}' has no '{attribute}'{near}.") from None


def construct(
    function: Callable[..., Any],
    args: Mapping[str, Any],
    key: str,
    refusals: tuple[type[Exception], ...] = (TypeError, ValueError),
    **offered: Any,
) -> Any:
    """`function(**args)`, with those of `offered` that its signature knows and `args` doesn't set.

    Raises UserError, naming `key`, for arguments that it doesn't take, lacks, or refuses (by an error
    of the classes `refusals`).
    """
    name = getattr(function, "__name__", None) or repr(function)  # which of weights takes a while
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument in args:
        if argument not in parameters and not open_ended:
            known = nearest(argument, parameters) or f"; it takes {', '.join(parameters) or 'none'}"
            raise UserError(f"{key}.{argument}: {name} has no such argument{known}.")
    given = {k: v for k, v in offered.items() if k in parameters} | dict(args)
    for parameter in parameters.values():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and parameter.name not in given:
            raise UserError(f"{key}.{parameter.name}: {name} needs this argument.")
    try:
        return function(**given)
    except refusals as error:
        reason = " ".join(str(error).split()).rstrip(".")
        shown = ", ".join(map(str, args)) or "its arguments"  # not their values: one may be a secret
        raise UserError(f"{key}: {name} refused {shown}: {reason}.") from error
