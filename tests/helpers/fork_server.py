"""Processes that need not import JAX and the package first: forks of one that has imported them.

Importing takes longer than most tests' own work. A fork runs a script or code as a new Python
would, with arguments, environment and standard streams of its own; where it matters what is
imported, and when, ``processes.py`` starts a new Python.
"""

import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

_MODULES = [
    "cotnet_jax.checkpoint.checkpointer",
    "cotnet_jax.commands.convert",
    "cotnet_jax.commands.evaluate",
    "cotnet_jax.commands.job",
    "cotnet_jax.commands.predict",
    "cotnet_jax.commands.train",
    "cotnet_jax.distributed.initialize",
    "cotnet_jax.predictor",
    "cotnet_jax.reports.curves",
    "cotnet_jax.training.evaluate",
    "cotnet_jax.training.loop",
    "cotnet_jax.weights.convert",
]
_REQUEST_BYTES = 1 << 20


class ForkedProcess:
    """What tests use of ``subprocess.Popen``, for a script, ``-m module`` or ``-c code``.

    Args:
      run: {"script": path}, {"module": name} or {"code": text}.
      arguments: after that.
      env: its whole environment, with the JAX_* and PYTHON* of this process.
      cwd: its folder.
      stdin, stdout: subprocess.PIPE or subprocess.DEVNULL; stderr is a pipe.
      start_new_session: as of Popen.
    """

    def __init__(
        self,
        run: dict[str, str],
        arguments: list[str],
        env: dict[str, str],
        cwd: str | os.PathLike | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        start_new_session: bool = False,
    ):
        self.args, self.returncode = [*run.values(), *arguments], None
        request = {"run": run, "arguments": arguments, "env": env, "cwd": str(cwd or os.getcwd())}
        request["start_new_session"] = start_new_session
        theirs = [os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)]
        self.stdin = self.stdout = None
        if stdin == subprocess.PIPE:
            os.close(theirs[0])
            theirs[0], ours = os.pipe()
            self.stdin = os.fdopen(ours, "w")
        if stdout == subprocess.PIPE:
            os.close(theirs[1])
            ours, theirs[1] = os.pipe()
            self.stdout = os.fdopen(ours)
        ours, stderr = os.pipe()
        self.stderr = os.fdopen(ours)
        self._status, status = os.pipe()
        theirs += [stderr, status]
        with _server() as server:
            socket.send_fds(server, [json.dumps(request).encode()], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        self.pid = int(self._read_line())

    def _read_line(self):
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self._status, 1)
        return line

    def poll(self):
        return self._await(0)

    def wait(self, timeout: float | None = None):
        if self._await(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _await(self, timeout):
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._read_line())
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None):
        """Return what is left of stdout and stderr, when the process has ended and closed them."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.stdin:
            self.stdin.close()
        read = {}
        streams = {"stdout": self.stdout, "stderr": self.stderr}

        def drain(name):
            read[name] = streams[name].read()

        threads = [
            threading.Thread(target=drain, args=(name,), daemon=True)
            for name, stream in streams.items()
            if stream and not stream.closed
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        self.wait(None if deadline is None else max(1, deadline - time.monotonic()))
        return read.get("stdout"), read.get("stderr")


def suits(env: dict[str, str]) -> bool:
    """Whether a fork with this environment is like a new process: imports read such variables."""

    def read_by_imports(env):
        return {k: v for k, v in env.items() if k.startswith(("JAX_", "PYTHON"))}

    return sys.platform == "linux" and read_by_imports(env) == read_by_imports(_environment())


def _environment():
    root = Path(__file__).resolve().parents[2]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
    }


_lock = threading.Lock()


@contextlib.contextmanager
def _server():
    """The connection to this process's server, which the first use starts."""
    with _lock:
        yield _start()


@functools.cache
def _start():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Where libraries have no threads, forking is safe.
    env = _environment() | {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=env,
        start_new_session=True,
    )
    theirs.close()
    return ours


def _serve(connection):
    """Fork for each request, until nobody can make one; return the request in the fork."""
    # The system reaps who waits for a fork.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _REQUEST_BYTES, 4)
        if not message:
            os._exit(0)
        if not os.fork():
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return json.loads(message), descriptors
        for descriptor in descriptors:
            os.close(descriptor)


def _fork_and_wait(status):
    """Return in a fork; here write its number and how it ended, and end."""
    pid = os.fork()
    if not pid:
        return
    for descriptor in range(3):
        os.close(descriptor)
    os.write(status, b"%d\n" % pid)
    _, how = os.waitpid(pid, 0)
    os.write(status, b"%d\n" % os.waitstatus_to_exitcode(how))
    os._exit(0)


def _become(request, descriptors):
    *streams, status = descriptors
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # Those of the server may be files, which these are not.
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(
        2, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    _fork_and_wait(status)
    os.close(status)
    if request["start_new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])


def _main():
    connection = socket.socket(fileno=int(sys.argv[1]))
    for module in _MODULES:
        importlib.import_module(module)
    request, descriptors = _serve(connection)
    _become(request, descriptors)
    return request


if __name__ == "__main__":
    request = _main()
    if "script" in request["run"]:
        script = request["run"]["script"]
        sys.argv = [script, *request["arguments"]]
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
    elif "module" in request["run"]:
        sys.argv, sys.path[0] = ["-m", *request["arguments"]], os.getcwd()
        runpy.run_module(request["run"]["module"], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *request["arguments"]]
        sys.path[0] = ""
        exec(compile(request["run"]["code"], "<string>", "exec"), {"__name__": "__main__"})
