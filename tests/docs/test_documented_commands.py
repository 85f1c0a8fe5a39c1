"""The commands that stand in README, CONTRIBUTING and docs: accepted, and run where they can be."""

import argparse
import fnmatch
import importlib
import inspect
import re
import sys
import tomllib

import pytest
from helpers import documented
from helpers.documented import SHORT

import main as main_script
from cotnet_jax import command_line

ROOT = documented.ROOT
BLOCKS = {command for file in documented.FILES for command in documented.block_commands(file)}
INLINE = {command for file in documented.FILES for command in documented.inline_commands(file)}
COMMANDS = sorted(BLOCKS | INLINE)

# Patterns of commands that the slow tests run in a folder which has what they name, and options
# that are added to make them short.
RUN = {
    "python -m cotnet_jax": "",
    "cotnet-prepare *": "--workers=1",
    "cotnet-train --config=cotnet50 *": SHORT,
    "cotnet-train --config=./mine.py *": SHORT,
    "cotnet-train --config=digits *": "--config.epochs=1 --config.schedule.warmup_epochs=0",
    "cotnet-train --help": "",
    "cotnet-evaluate *--weights=*": SHORT,
    "cotnet-evaluate *--workdir=*": f"{SHORT} --config.resume.allow_changes=data.name",
    "cotnet-convert --to_torch *": "",
    "cotnet-convert --weights=cotnet50.pth.tar *": "",
    "cotnet-predict --weights=DIR *": "",
    "cotnet-predict --weights=PATH *": "",
    "cotnet-predict --weights=runs/*": "",
    "cotnet-predict --weights=weights/*": "",
    "cotnet-train --config=finetune *": SHORT,
    "cotnet-plot *": "",
    "cotnet-export *": "",
    "cotnet-benchmark *": f"{SHORT} --variants='as configured' --config.data.eval_split=train[:8]",
    "python -m cotnet_jax.tools.make_fake_imagenet *": "--train_per_class=1 --validation=10",
    "python -m cotnet_jax.tools.benchmark_input *": "--seconds=0.2 --batch_size=8 --workers=1",
    "python -m cotnet_jax.tools.check_randaugment": "--images=1 --size=32 --batch_size=2",
}
# Those that are not run here, and why.
NOT_RUN = {
    "pip install *": "installs from the network",
    "*/python -m pip install *": "installs from the network",
    "*/pre-commit install": "installs from the network",
    "make *": "installs from the network; its targets are what the workflow runs",
    "*/python -m pytest *": "these tests themselves",
    "srun *": "needs SLURM",
    "*--coordinator_address=*": "needs several hosts; tests/distributed/ has them on one",
    "python main.py*": "a name; tests/end_to_end/ runs it",
    "python -m cotnet_jax train": "a name; tests/commands/ starts it",
    "python -m cotnet_jax.tools.check_export *": "takes minutes; tests/tools/ calls it",
    "python -m cotnet_jax.tools.benchmark_export *": "takes minutes",
    "python -m cotnet_jax.tools.check_golden *": "takes minutes; tests/models/ compares the same",
    "python -m cotnet_jax.tools.check_kernels *": "needs a GPU",
    "*python -m cotnet_jax.tools.sanitize_kernels*": "needs a GPU",
    "python -m cotnet_jax.tools.benchmark_ops *": "needs a GPU",
    "python -m cotnet_jax.tools.benchmark_model *": "takes cotnet50 and large batches",
    "python -m cotnet_jax.tools.benchmark_peers *": "takes cotnet50, and PyTorch",
    "python -m cotnet_jax.tools.check_scaling *": "trains cotnet50 on several GPUs",
    "python -m cotnet_jax.tools.benchmark_scaling*": "measures cotnet50 on several GPUs",
    "python -m cotnet_jax.tools.check_scaling": "trains cotnet50 on several GPUs",
    "python -m cotnet_jax.tools.tune_kernels *": "needs a GPU",
    "python -m torch.distributed.launch *": "the original's own",
    "cotnet-* --weights=*.h5 *": "a published file; tests/weights/test_keras.py makes such files",
    "cotnet-predict --weights=hf-hub:*": "needs the network; tests/weights/test_hub.py has a Hub",
    "hf auth login": "of another package, and needs the network",
    "xprof *": "a server, of another package",
    "jupyter *": "a server, of another package",
    "python docs/cut_photographs.py *": "needs scikit-image",
}


def matching(command):
    """The patterns of both tables that a command is under."""
    # Not fnmatch itself: [:8000] is no set of characters here.
    escaped = {pattern: pattern.replace("[", "[[]") for pattern in (*RUN, *NOT_RUN)}
    return [each for each, glob in escaped.items() if fnmatch.fnmatchcase(command, glob)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_one_table(command):
    assert len(matching(command)) == 1


def test_the_tables_have_nothing_else():
    used = {pattern for command in COMMANDS for pattern in matching(command)}
    assert used == {*RUN, *NOT_RUN}


class ParsedError(Exception):
    """The parser took the options."""


@pytest.fixture
def stop_when_parsed(monkeypatch):
    """Let a program end as soon as its options are parsed."""

    def stop_after(parse_args):
        def parse(*arguments):
            parse_args(*arguments)
            raise ParsedError

        return parse

    for parser in (argparse.ArgumentParser, command_line.Parser):
        monkeypatch.setattr(parser, "parse_args", stop_after(parser.parse_args))


def parse(module, arguments, monkeypatch):
    """Parse, and run nothing; ends like the program where the options are wrong."""
    if module == "main":
        main_script.parse(arguments)
        return
    program = importlib.import_module(module)
    if module.startswith("cotnet_jax.commands."):
        program.parse(arguments)
        return
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    takes_arguments = inspect.signature(program.main).parameters
    program.main(*[arguments] if takes_arguments else [])


OURS = [
    command
    for command in COMMANDS
    if documented.module_of(command) and command != "python -m cotnet_jax"
]


@pytest.mark.parametrize("command", OURS)
def test_its_options_are_accepted(command, stop_when_parsed, monkeypatch, capsys, tmp_path):
    """Also those of commands that cannot run here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from cotnet_jax.configs.cotnet50 import get_config")
    module, arguments = documented.module_of(
        command.replace("--config=...", "--config=digits").replace(
            " ... ", " --config=digits --workdir=DIR "
        )
    )
    try:
        parse(module, arguments, monkeypatch)
    except ParsedError:
        return
    except SystemExit as end:
        error = capsys.readouterr().err
        incomplete = command not in BLOCKS and "is missing" in error and "unknown" not in error
        assert end.code == 0 or incomplete, error


def test_a_wrong_option_would_be_noticed(stop_when_parsed, monkeypatch, capsys):
    for command in (
        "cotnet-train --config=cotnet50 --workdri=DIR",
        "cotnet-predict --weights=x --tops=3 a.jpg",
        "python -m cotnet_jax.tools.benchmark_ops aggregation --batch=3",
        "python -m cotnet_jax.tools.make_fake_imagenet --outptu=x",
    ):
        with pytest.raises(SystemExit) as end:
            parse(*documented.module_of(command), monkeypatch)
        assert end.value.code


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("make ")])
def test_its_target_is_in_the_makefile(command):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = [word for word in command.split()[1:] if "=" not in word and word != "..."]
    assert set(named) <= set(targets)


@pytest.mark.parametrize("command", [each for each in COMMANDS if "pip install" in each])
def test_its_extra_is_in_pyproject(command):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"\.\[(\w+)\]", command)) <= set(project["optional-dependencies"])


def link_all_but(source, target, path):
    """Link what is in a folder into another, but for what a command writes, such as ["runs", "x"].

    Its folder is made.
    """
    for entry in source.iterdir():
        if [entry.name] == path[:1]:
            if path[1:]:
                (target / entry.name).mkdir()
                link_all_but(entry, target / entry.name, path[1:])
        else:
            (target / entry.name).symlink_to(entry)


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.parametrize("command", [each for each in COMMANDS if set(matching(each)) & set(RUN)])
def test_it_runs(command, world, tmp_path):
    written = re.search(r"(?:cotnet-(?!evaluate)|make_).* --(?:output|workdir)=(\S+)", command)
    link_all_but(world, tmp_path, written[1].split("/") if written else [])
    result = documented.run(f"{command} {RUN[matching(command)[0]]}", tmp_path)
    assert result.stdout
