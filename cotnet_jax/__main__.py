"""``python -m cotnet_jax`` lists the commands, and ``python -m cotnet_jax NAME`` runs one."""

import difflib
import importlib
import sys

from cotnet_jax import command_line, configs
from cotnet_jax.commands import SUMMARIES
from cotnet_jax.version import __version__, versions


def main(arguments: list[str] | None = None) -> int | None:
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in SUMMARIES:
        return importlib.import_module(f"cotnet_jax.commands.{name}").main(rest)
    if name == "--version":
        print(versions())
        return 0
    if name in ("--help", "-h", "help"):
        print(overview())
        return 0
    near = difflib.get_close_matches(name, SUMMARIES, n=1)
    hint = f"; did you mean {command_line.command(near[0])}?" if near else ""
    print(f"error: no command {name!r}{hint}\n\n{overview()}", file=sys.stderr)
    return 1


def overview() -> str:
    """Return the commands with a line each, and the configurations."""
    width = max(map(len, SUMMARIES))
    lines = [f"  cotnet-{name:{width}}  {summary}" for name, summary in SUMMARIES.items()]
    return "\n".join(
        [
            f"cotnet_jax {__version__}: CoTNet (Contextual Transformer Networks) in JAX.",
            "",
            *lines,
            "",
            "Each has --help. Where they are not installed: python -m cotnet_jax train, and so on.",
            f"Configurations for --config: {', '.join(configs.names())}.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
