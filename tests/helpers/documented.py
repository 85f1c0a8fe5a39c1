"""The commands and the Python code that stand in Markdown files."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
# A small network and few images in place of the recipe's, for commands that run here.
SHORT = (
    "--config.model.name=cotnet_tiny --config.data.image_size=32 --config.epochs=1 "
    "--config.schedule.warmup_epochs=0 "
    "--config.batch_size=8 --config.eval.batch_size=8 "
    "--config.data.num_workers=0 --config.data.num_threads=1 "
    "--config.data.train_split=train[:16] --config.data.eval_split=validation[:8]"
)
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
_SPAN = re.compile(r"`([^`]+)`")
# An inline span that begins like this is a command, if something follows.
_PROGRAM = re.compile(
    r"([A-Z_]+=\S+\s+)*"
    r"(cotnet-[a-z]+|(\.venv/bin/)?python3?|pip|make|srun|xprof|jupyter|compute-sanitizer)\s+\S"
)


def blocks(file: Path, language: str) -> list[str]:
    """The fenced code blocks of a language, in order."""
    found = _FENCE.findall(file.read_text(encoding="utf-8"))
    return [body for name, body in found if name == language]


def block_commands(file: Path) -> list[str]:
    """The commands of bash blocks, without comments, in one line each."""
    lines = "\n".join(blocks(file, "bash")).replace("\\\n", " ").splitlines()
    return [command for line in lines for command in _split(line)]


def inline_commands(file: Path) -> list[str]:
    """The commands in running text and tables; what they need may be left out."""
    spans = _SPAN.findall(_FENCE.sub("", file.read_text(encoding="utf-8")))
    return [command for span in spans if _PROGRAM.match(span) for command in _split(span)]


def _split(line: str) -> list[str]:
    # Only a comment has a # after spaces here.
    line = re.sub(r"(^|\s+)#.*", "", line)
    return [" ".join(part.split()) for part in line.split(" && ") if part.strip()]


def module_of(command: str) -> tuple[str, list[str]] | None:
    """The module of this repository that a command runs, and its arguments; None if none does.

    What a launcher such as srun starts is such a command too.
    """
    words = shlex.split(command)
    for index, word in enumerate(words):
        rest = words[index + 1 :]
        if word.startswith("cotnet-"):
            return f"cotnet_jax.commands.{word.removeprefix('cotnet-')}", rest
        if word not in ("python", "python3") or not rest:
            continue
        if rest[0] == "main.py":
            return "main", rest[1:]
        if rest[0] == "convert_torch_weights.py":
            return "cotnet_jax.commands.convert", rest[1:]
        if rest[0] == "-m" and rest[1] == "cotnet_jax":
            if rest[2:] and not rest[2].startswith("-"):
                return f"cotnet_jax.commands.{rest[2]}", rest[3:]
            return "cotnet_jax.__main__", rest[2:]
        if rest[0] == "-m" and rest[1].startswith("cotnet_jax."):
            return rest[1], rest[2:]
    return None


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a command as users do, but without installing it."""
    module, arguments = module_of(command)
    module = re.sub(r"^cotnet_jax\.commands\.", "cotnet_jax ", module.removesuffix(".__main__"))
    result = subprocess.run(
        [sys.executable, "-m", *module.split(), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder)},
        timeout=600,
    )
    assert result.returncode == 0, f"{command}\n{result.stderr}"
    return result
