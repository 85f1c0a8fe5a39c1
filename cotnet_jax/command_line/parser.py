"""One style for all commands: help that begins with examples, and errors of one line."""

import argparse
import difflib
import io
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from cotnet_jax import files
from cotnet_jax.command_line.invocation import as_typed
from cotnet_jax.version import versions

KINDS = ("ema", "raw")
_WIDTH = 100
# Options up to this long share the line of their description.
_INDENT = 27


def print_any_name() -> None:
    """Let standard output hold names of files that are not UTF-8, as the bytes that they are."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf_8 = sys.stdout.encoding.lower().replace("_", "-") in ("utf-8", "utf8")
        sys.stdout.reconfigure(errors="surrogateescape" if utf_8 else "backslashreplace")


class Parser(argparse.ArgumentParser):
    """A parser of command line options, ``--name=VALUE``.

    Several wrong options give one error that names all of them and what to type instead.

    Args:
      summary: one line on what the command does.
      examples: commands that can be pasted, the commonest first; "cotnet-train ..." is shown in
        the way that this process was started.
      notes: printed after the options, wrapped already.
      replaced: former spellings, and what to type now: {"--input": "--weights=PATH"}.
    """

    def __init__(
        self,
        summary: str,
        examples: Sequence[str],
        *,
        notes: str = "",
        replaced: Mapping[str, str] | None = None,
    ):
        super().__init__(add_help=False, allow_abbrev=False)
        self._summary = summary
        self.examples = [as_typed(example) for example in examples]
        self._notes = notes
        self._replaced = replaced or {}
        self._names: list[str] = []
        self._required: list[tuple[str, str]] = []
        self._rows: list[tuple[str, str]] = []
        super().add_argument("-h", "--help", action="help")
        super().add_argument("--version", action=_PrintVersions, nargs=0, default=argparse.SUPPRESS)

    def add_argument(  # type: ignore[override]  # Narrower on purpose: one name and a help.
        self,
        name: str,
        *,
        help: str,
        required: bool = False,
        choices: Sequence[str] = (),
        **options: Any,
    ) -> argparse.Action:
        """Add an option ``--name`` or a positional argument, as in ``argparse``.

        Args:
          name: the only spelling.
          help: a few words, in which ``%(default)s`` stands for the default.
          required: also of positional arguments; what is missing is reported together.
          choices: the values allowed.
          **options: further ones of ``argparse``.
        """
        if choices:
            options = {"type": _one_of(choices), "metavar": "|".join(choices), **options}
        action = super().add_argument(name, help=help, **options)
        shown = str(action.metavar or name)
        if action.option_strings:
            self._names.append(name)
            shown = name if action.nargs == 0 else f"{name}={action.metavar or 'VALUE'}"
        if required:
            self._required.append((action.dest, shown))
        self.describe(shown, help % {"default": action.default})
        return action

    def describe(self, option: str, help: str) -> None:
        """Add a line to the help, on an option that something else parses."""
        self._rows.append((option, help))

    def parse_known_args(self, args=None, namespace=None):
        """Return (options, the rest), and exit if a former spelling is used or one is missing."""
        args = list(sys.argv[1:] if args is None else args)
        names = {arg.split("=")[0] for arg in args}
        problems = [
            f"{former} is called {now} now"
            for former, now in self._replaced.items()
            if former in names
        ]
        if problems:
            self.error("; ".join(problems))
        options, rest = super().parse_known_args(args, namespace)
        missing = [f"{s} is missing" for dest, s in self._required if not getattr(options, dest)]
        if missing:
            self.error_with_examples("; ".join([*self.unknown(rest), *missing]))
        return options, rest

    def parse_args(self, args=None, namespace=None) -> Any:
        """Return the options, or exit with an error that names all that are wrong or missing."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error("; ".join(self.unknown(rest)))
        return options

    def unknown(self, arguments: Sequence[str], *others: str) -> list[str]:
        """Return an error for each of these arguments, with the nearest option there is.

        Args:
          arguments: what nothing has parsed.
          *others: names of options that something else parses.
        """
        problems = []
        for argument in arguments:
            name = argument.split("=")[0]
            if not name.startswith("-"):
                problems.append(f"unknown argument {argument}")
                continue
            near = difflib.get_close_matches(name, [*self._names, *others], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"unknown option {name}{hint}")
        return problems

    def error(self, message: str) -> NoReturn:
        """Print one line on what was wrong, and exit with code 1."""
        name, _, reason = message.removeprefix("argument ").partition(": ")
        # A positional argument is named by its choices, which the reason has already.
        shown = reason if reason.startswith(f"must be {name},") else f"{name}: {reason}"
        self.exit(1, f"error: {shown if reason else name}\n")

    def error_with_examples(self, message: str) -> NoReturn:
        """Print what was wrong and how the command is used, and exit with code 1."""
        self.exit(1, f"error: {message}\n{self.format_usage()}")

    def format_usage(self) -> str:
        """Return the examples, which show what is required better than a list of options."""
        return "".join(["Examples:\n", *(f"  {example}\n" for example in self.examples)])

    def format_help(self) -> str:
        """Return the whole help: summary, examples, options, notes."""
        last = [("--help", "This text."), ("--version", "The version, and those of what it needs.")]
        rows = "".join(_row(*row) for row in [*self._rows, *last])
        notes = f"\n{self._notes.strip()}\n" if self._notes else ""
        return f"{self._summary}\n\n{self.format_usage()}\nOptions:\n{rows}{notes}"


class _PrintVersions(argparse.Action):
    """Like argparse's own action, but looks the versions up only when they are asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(versions())
        parser.exit()


def add_weights(
    parser: Parser, help: str, *, required: bool = False, several: bool = False
) -> None:
    """Add ``--weights=PATH``, also hf-hub:OWNER/NAME, and ``--kind=ema|raw``.

    Args:
      parser: to add to.
      help: on the weights.
      required: without weights there is an error.
      several: the option may be repeated, and gives a list.
    """
    parser.add_argument(
        "--weights",
        type=_weights_path,
        metavar="PATH",
        required=required,
        help=help,
        action="append" if several else "store",
        default=[] if several else None,
    )
    parser.add_argument(
        "--kind", choices=KINDS, help="Kind of its weights; by default the EMA, if it has one."
    )


def add_model(parser: Parser) -> None:
    """Add ``--model=NAME``."""
    parser.add_argument(
        "--model", metavar="NAME", help="Name of the model, if a PyTorch file fits several."
    )


def add_classes(parser: Parser) -> None:
    """Add ``--classes=FILE``."""
    parser.add_argument(
        "--classes",
        type=path,
        metavar="FILE",
        help="Names of the classes, one on each line; by default those of the weights.",
    )


def path(text: str) -> str:
    """Return a path of the file system, absolute; a ``type`` for ``add_argument``."""
    return _parsed(lambda: str(files.local(text)))


def positive(text: str) -> int:
    """Parse an integer of 1 or more; a ``type`` for ``add_argument``."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more, not {text!r}")
    return value


def positives(text: str) -> list[int]:
    """Parse integers of 1 or more between commas; a ``type`` for ``add_argument``."""
    return [positive(number) for number in text.split(",")]


def _weights_path(text: str) -> str:
    if text in KINDS and not os.path.exists(text):
        raise argparse.ArgumentTypeError(
            f"must be the path of the weights; choose their kind by --kind={text}"
        )
    return _parsed(lambda: files.expand(text)) if files.is_hub(text) else path(text)


def _parsed(parse: Callable[[], str]) -> str:
    """Return what ``parse`` does, with its ValueError as one on the option."""
    try:
        return parse()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text):
        if text not in choices:
            raise argparse.ArgumentTypeError(f"must be {'|'.join(choices)}, not {text!r}")
        return text

    return parse


def _row(option: str, help: str) -> str:
    """Option and description, beside each other or, for a long option, below."""
    lines = textwrap.wrap(help, _WIDTH - _INDENT)
    start = f"  {option}"
    beside = len(start) <= _INDENT - 2
    first = f"{start:{_INDENT}}{lines.pop(0)}\n" if beside else f"{start}\n"
    return first + "".join(f"{'':{_INDENT}}{line}\n" for line in lines)
