"""The options --config=NAME, or a file, and --config.FIELD=VALUE, for ml_collections to parse."""

import difflib
import importlib.machinery
import importlib.util
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from cotnet_jax import configs, files
from cotnet_jax.command_line.parser import Parser

_OPTION = "--config"


def add(parser: Parser) -> None:
    """Describe the options in the help."""
    parser.describe(
        f"{_OPTION}=NAME|FILE",
        f"Configuration: {', '.join(configs.names())}; or a file of your own by its path, such as "
        "./mine.py.",
    )
    parser.describe(
        f"{_OPTION}.FIELD=VALUE",
        "Override a field; cotnet_jax/configs/default.py explains them all.",
    )


def parse(
    parser: Parser, arguments: Sequence[str] | None, *, required: bool = True
) -> tuple[Any, list[str]]:
    """Return all options, and the arguments of ml_collections among them.

    Args:
      parser: of all options but those of the configuration.
      arguments: by default those that the process was started with.
      required: False takes the configuration default where none is named.

    Returns:
      The options, with the configuration, locked, as ``config``, and as ``config_named`` whether
      it was named; and the arguments that are not the parser's own.

    Exits with an error if no configuration is named, if there is none of that name, if it cannot be
    loaded, if a field is misspelt or cannot have its value, or if an option is unknown.
    """
    options, rest = parser.parse_known_args(arguments)
    value, others = _split(rest)
    config = None
    options.config_named = value is not None
    if value is None and not required:
        config = load(str(configs.path()))
    if value is not None:
        try:
            config = load(value)
        except (ValueError, OSError) as error:
            parser.error(f"{_OPTION}={value}: {error}")
    unknown = parser.unknown(_override(parser, config, others), _OPTION)
    if unknown:
        parser.error("; ".join(unknown))
    if config is None:
        parser.error_with_examples(f"{_OPTION}=NAME is missing")
    options.config = config
    return options, rest


def given_fields(config: ml_collections.ConfigDict, arguments: Sequence[str]) -> dict[str, Any]:
    """Return {"section.field": value} of the fields that were set by options.

    Args:
      config: from ``parse``.
      arguments: from ``parse``, too.
    """
    names = (re.match(rf"--?(?:no)?{_OPTION[2:]}\.([\w.]+)", each) for each in arguments)
    fields = {name[1]: config for name in names if name}
    for field in fields:
        for key in field.split("."):
            fields[field] = fields[field][key]
    return fields


def _override(
    parser: Parser, config: ml_collections.ConfigDict | None, arguments: Sequence[str]
) -> list[str]:
    """Set the fields that are given, lock the configuration, and return the arguments left."""
    # Flags of their own, so that a process can parse several command lines.
    program, field_flags = "", flags.FlagValues()
    try:
        if config is not None:
            config_flags.DEFINE_config_dict(
                _OPTION.removeprefix("--"),
                config,
                flag_values=field_flags,
                sys_argv=[program, *arguments],
            )
        rest = field_flags([program, *arguments], known_only=True)
        # Absl's own, such as --verbosity. Grain reads flags, and wants them parsed.
        return flags.FLAGS(rest, known_only=True)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        parser.error(_explain(error, arguments))


def load(value: str) -> ml_collections.ConfigDict:
    """Return the configuration that ``--config=value`` names, not locked.

    Args:
      value: as ``find`` takes it; after a colon an argument for ``get_config`` may follow.

    Raises:
      ValueError: there is no such configuration, or its file cannot be used; says why.
    """
    name, colon, argument = value.partition(":")
    path = find(name)
    loader = importlib.machinery.SourceFileLoader("config_file", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
        config = module.get_config(argument) if colon else module.get_config()
    except Exception as error:
        raise ValueError(_explain_file(error, path)) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"its get_config() returned {type(config).__name__}, not an ml_collections.ConfigDict"
        )
    return config


def find(name: str) -> str:
    """Return the path of the file that ``--config=name`` names.

    With a slash, a ``~`` in front or the suffix .py it is a path; else it is the name of a
    configuration of the package, whatever files there are.

    Raises:
      ValueError: there is none; says what to type.
    """
    shipped = configs.names()
    if "/" in name or os.sep in name or name.endswith(".py") or name.startswith("~"):
        path = files.expand(name)
        if os.path.isfile(path):
            return path
        stem = Path(name).stem
        raise ValueError(f"no such file{_did_you_mean([stem] if stem in shipped else [])}")
    if name in shipped:
        return str(configs.path(name))
    near = [file for file in (f"./{name}.py", f"./{name}") if os.path.isfile(file)]
    near += difflib.get_close_matches(name, shipped, n=1)
    raise ValueError(
        f"no such configuration{_did_you_mean(near)} There are {', '.join(shipped)}; a file of "
        "your own is named by its path, such as ./mine.py"
    )


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {_OPTION}={near[0]}?" if near else "."


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the last value of --config, None if there is none, and the other arguments."""
    value, others, expected = None, [], False
    for argument in arguments:
        name, equals, given = argument.partition("=")
        if expected:
            value, expected = argument, False
        elif name in (_OPTION, _OPTION[1:]):
            value, expected = given if equals else value, not equals
        else:
            others.append(argument)
    return value, others


def _explain(error: Exception, arguments: Sequence[str]) -> str:
    """Return an error of ml_collections in one line, with the option that caused it."""
    if isinstance(error, AttributeError | KeyError):
        field, hint = _unknown_field(error)
        given = [arg for arg in arguments if field and f".{field}" in arg.split("=")[0]]
        if given:
            return f"{', '.join(given)}: no such field{hint} {configs.path()} has them all."
    text = str(error.args[0] if error.args else error)
    return " ".join(text.removeprefix("flag ").split())


def _unknown_field(error: AttributeError | KeyError) -> tuple[str, str]:
    """Return the name of the field that ml_collections does not find, and a hint."""
    near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
    if near:
        return near[2], f", did you mean {near[1]}?"
    name = re.search(r"['\"](\w+)['\"]", str(error))
    return name[1] if name else "", "."


def _explain_file(error: Exception, path: str) -> str:
    """Return what is wrong in the file of a configuration, and in which line."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    if isinstance(error, ImportError) and error.name == "configs":
        return "configs is the checkout's; write: from cotnet_jax.configs import ..."
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == path
    ]
    text = " ".join(str(error).split())
    if isinstance(error, AttributeError | KeyError) and "did you mean" in text.lower():
        field, hint = _unknown_field(error)
        text = f"no field {field!r}{hint}"
    return f"line {lines[-1]}: {text}" if lines else text
