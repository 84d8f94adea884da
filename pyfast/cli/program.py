# SPDX-License-Identifier: Apache-2.0
"""Arguments of the command line, and the command that they name."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import re
import sys
import typing
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser, Namespace

from pyfast import __version__
from pyfast.cli.commands import convert, generate, merge, quantize
from pyfast.cli.info import info
from pyfast.errors import PyfastError
from pyfast.train.config import FinetuneConfig

_COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "merge": merge,
    "quantize": quantize,
    "convert": convert,
    "info": info,
}
_NOUNS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list[str]: "a list of texts",
    tuple[float, float]: "a list of two numbers",
}


class _Parser(ArgumentParser):
    """Takes flags by their whole names only, and tells an error without a page of usage before it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        hint = _nearest_flags(message, list(parser._option_string_actions))
        message = _in_words(message, {action.dest: action for action in parser._actions})
        sys.stderr.write(f"error: {message}{hint}\nAll options: {command} --help\n")
        sys.exit(2)


def _nearest_flags(message: str, flags: list[str]) -> str:
    """A question that names what an unknown flag may have meant; empty where nothing is like it."""
    unknown = message.partition("unrecognized arguments: ")[2].partition("=")[0].split()
    if not unknown or not unknown[0].startswith("--"):
        return ""
    near = [flag for flag in flags if flag.startswith(unknown[0])]
    near = near or difflib.get_close_matches(unknown[0], flags, 1)
    return f". Did you mean {' or '.join(near)}?" if near else ""


def _in_words(message: str, actions: dict[str, Any]) -> str:
    """What is wrong with a value, in place of jsonargparse's message that shows types of Python."""
    wrong = re.match(r'Parser key "([^"]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
    if not wrong or wrong[1] not in actions:
        return message
    return f"{wrong[1]} is {wrong[2]!r}; it must be {_allowed(actions[wrong[1]]._typehint)}"


def _allowed(hint: Any) -> str:
    """The values that a type of the settings has."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(parts)}"
    given = parts if kind is UnionType else (hint,)  # None stands for what is not given
    return " or ".join(_NOUNS[part] for part in given if part is not NoneType)


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser of the command line, and that of each command."""
    parser = _Parser(
        prog="pyfast", description="Fine-tune transformer models.", version=__version__
    )
    commands = parser.add_subcommands(dest="command")
    about = "Fine-tune a model; with no argument, a small one on a small data set."
    finetune = _Parser(description=about)
    finetune.add_argument(
        "--config", action="config", help="YAML file with any of the settings below."
    )
    finetune.add_class_arguments(FinetuneConfig)
    subparsers: dict[str, ArgumentParser] = {"finetune": finetune}
    for name, function in _COMMANDS.items():
        subparsers[name] = _Parser(description=(function.__doc__ or "").splitlines()[0])
        subparsers[name].add_function_arguments(function)
    for name, subparser in subparsers.items():
        for action in subparser._actions:
            if getattr(action, "_typehint", None) is bool:  # the flag alone means true
                action.nargs, action.const = "?", True
        subparser.add_argument(
            "--debug", action="store_true", help="Show the traceback of an error."
        )
        commands.add_subcommand(name, subparser, help=subparser.description)
    return parser, subparsers


def _parse(
    parser: ArgumentParser, subparsers: dict[str, ArgumentParser], given: list[str]
) -> Namespace:
    """The command and its values, as they were written where their type is text."""
    for number, text in enumerate(given, start=1):
        if not _is_unicode(text):
            parser.error(f"argument {number} is not UTF-8: {text!r}")
    try:
        parsed = parser.parse_args(given)
    except UnicodeDecodeError as error:
        parser.error(f"the --config file is not UTF-8: {error}")
    values, subparser = parsed[parsed.command], subparsers[parsed.command]
    for action in subparser._actions:
        # The value is read as YAML first, where null, ~ and a line that starts with # mean nothing.
        if getattr(action, "_typehint", None) == (str | None) and values[action.dest] is None:
            values[action.dest] = _written(given, action.option_strings[-1])
    if parsed.command == "finetune":
        for part in dataclasses.fields(FinetuneConfig):
            if part.default is dataclasses.MISSING and not isinstance(
                value := values[part.name], Namespace
            ):
                subparser.error(f"{part.name} is {value!r}; it must be a mapping of settings")
    instantiated: Namespace = parser.instantiate(parsed)
    return instantiated


def _is_unicode(text: str) -> bool:
    """Whether all bytes of an argument could be decoded."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _written(given: list[str], flag: str) -> str | None:
    """The last value of a flag as it was written."""
    text = None
    for word, following in itertools.zip_longest(given, given[1:]):
        if word == flag:
            text = following
        elif word.startswith(f"{flag}="):
            text = word.partition("=")[2]
    return text


def _call(command: str, values: dict[str, Any]) -> None:
    if command == "finetune":
        from pyfast.train import finetune

        finetune(FinetuneConfig(**values))
    else:
        _COMMANDS[command](**values)


def run(given: list[str]) -> int:
    """Run the command that the arguments name; its exit status, or SystemExit from the parser."""
    _quiet()
    parser, subparsers = _parsers()
    if not given:
        parser.print_help(sys.stderr)
        return 2
    arguments = _parse(parser, subparsers, given)
    values = vars(arguments[arguments.command])
    debug = values.pop("debug")
    values.pop("config", None)
    try:
        _call(arguments.command, values)
    except PyfastError as error:
        if debug:
            raise
        sys.stderr.write(f"{type(error).__name__} {error}\n")
        return 2
    return 0


def _quiet() -> None:
    """No progress bars and hints of libraries between our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
