"""How this process was started, so that the commands that it prints can be pasted."""

import re
import shlex
import shutil
import sys
from pathlib import Path

# Other ways to start a command than its own name: a script of the checkout or a module, and the
# options with which it is that command.
_SCRIPTS = {
    "main.py": {"train": "", "evaluate": " --mode=evaluate"},
    "convert_torch_weights.py": {"convert": ""},
}
_MODULES = {
    "cotnet_jax.predict": {"predict": ""},
    "cotnet_jax.data.prepare": {"prepare": ""},
    "cotnet_jax.tools.benchmark_step": {"benchmark": ""},
}
_CHECKOUT = Path(__file__).resolve().parents[2]
_PREFIX = "cotnet-"


def command(name: str) -> str:
    """Return what to type for a command, such as "train", in the way that this process was started.

    "cotnet-train" after an installed command, and in programs that are none of the package's;
    "python main.py" or "python -m cotnet_jax train" after one of these.
    """
    installed = _PREFIX + name
    script = Path(sys.argv[0] if sys.argv else "")
    module = _module()
    if module in _MODULES or module == "cotnet_jax":
        started, own = f"-m {module}", _MODULES.get(module, {})
    elif script.name in _SCRIPTS and script.resolve().parent == _CHECKOUT:
        started, own = shlex.quote(sys.argv[0]), _SCRIPTS[script.name]
    elif script.name.startswith(_PREFIX) and not _on_path(script):
        return shlex.quote(str(script.with_name(installed)))
    else:
        return installed
    # As typed too: the Python of an environment that is not activated has a path.
    python = shlex.quote((sys.orig_argv or ["python"])[0])
    if name in own:
        return f"{python} {started}{own[name]}"
    return f"{python} -m cotnet_jax {name}"


def as_typed(text: str) -> str:
    """Return a text with each "cotnet-train" and the like replaced by ``command``."""
    return re.sub(rf"(?<![\w./-]){_PREFIX}([a-z]+)", lambda match: command(match[1]), text)


def _on_path(script: Path) -> bool:
    found = shutil.which(script.name)
    return found is not None and Path(found).resolve() == script.resolve()


def _module() -> str:
    """Return the name of the module that ``python -m`` runs, or ""."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else ""
