"""Runs Python in other processes, for tests that need several devices, processes or a kill."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

from helpers import fork_server
from helpers.fork_server import ForkedProcess

_TESTS = Path(__file__).resolve().parents[1]


Process = subprocess.Popen | ForkedProcess


def start_python(
    code: str, *arguments, devices: int = 1, stdin: bool = False, fresh: bool = False
) -> Process:
    """Starts ``python -c code arguments`` on the CPU with so many fake devices.

    ``code`` is dedented, and can import the package, the configs and the tests' helpers.
    """
    return start(
        {"code": textwrap.dedent(code)},
        *arguments,
        env=_environment(devices),
        fresh=fresh,
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
    )


def start(run: dict[str, str], *arguments, env, fresh: bool = False, **options) -> Process:
    """Starts a process, by a fork of one that has imported what it needs unless it is ``fresh``.

    Args:
      run, arguments, env, options: as of ``ForkedProcess``.
    """
    arguments = [*map(str, arguments)]
    if not fresh and fork_server.suits(env):
        return ForkedProcess(run, arguments, env, **options)
    ((kind, what),) = run.items()
    before = {"script": [], "module": ["-m"], "code": ["-c"]}[kind]
    return subprocess.Popen(
        [sys.executable, *before, what, *arguments],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        **{"stdout": subprocess.PIPE} | options,
    )


def run_python(
    run: dict[str, str], *arguments, timeout: float = 600, **options
) -> subprocess.CompletedProcess:
    """Runs a process of ``start`` to its end, in the environment of this one."""
    process = start(run, *arguments, env=_environment(1), **options)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


class TrainingRun:
    """main.py in a process group of its own, read line by line; a ``Process`` else.

    Args:
      workdir: of the run.
      flags: the others.
      small: with the network of small_network.py in place of the configuration's.
      before: code that the process runs first, dedented, before anything is imported.
    """

    def __init__(
        self,
        workdir,
        *flags: str,
        small: bool = True,
        before: str = "",
        devices: int = 1,
        stdout: int = subprocess.DEVNULL,
        environment: dict[str, str] | None = None,
    ):
        script = _TESTS / "helpers" / "small_network.py" if small else _TESTS.parent / "main.py"
        run_script = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
        code = f"{textwrap.dedent(before)}\n{run_script}"
        self._process = start(
            {"code": code} if before else {"script": str(script)},
            *(f"--workdir={workdir}", *flags),
            env=_environment(devices) | (environment or {}),
            fresh=bool(before or environment),
            stdout=stdout,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def __getattr__(self, name):
        return getattr(self._process, name)

    def wait_for(self, text: str) -> str:
        """Reads on until a line has ``text``, and gives that line."""
        for line in self.stderr:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"{text!r} was not said:\n{''.join(self.lines)}")

    def end(self, timeout: float = 120) -> str:
        """Waits for the end, and gives all that was said; ``returncode`` and ``out`` are set."""
        try:
            self.out, rest = self.communicate(timeout=timeout)
        finally:
            self.kill()
        return "".join([*self.lines, rest])


def _environment(devices: int) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(
            [str(_TESTS.parent), str(_TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }


def finish(*processes: Process, timeout: float = 120) -> list[str]:
    """Waits for all of them; their standard outputs. Fails with its output if one fails."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, out + err
    return [out for out, _ in outputs]


def free_address() -> str:
    """host:port on this machine, for ``jax.distributed.initialize``."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"
