"""Converts PyTorch weights of a CoTNet for JAX, and back.

    python convert_torch_weights.py --input=cotnet50.pth.tar --output=cotnet50
    python convert_torch_weights.py --to-torch --input=cotnet50 --output=cotnet50.safetensors

Neither needs PyTorch, and nothing in the file is executed. A .pth.tar is not to be unpacked.
"""

import sys

from absl import app, flags, logging

from cotnet_jax.weights import convert

_INPUT = flags.DEFINE_string(
    "input",
    None,
    "A .pth.tar, .pth or .safetensors file; with --to-torch also a converted folder or the "
    "workdir of a training run.",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to make; with --to-torch a .safetensors file to make."
)
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Name of the model, such as cotnet50; found by the names and shapes of the tensors if left "
    "out. se_cotnetd_152 and se_cotnetd_152_L share theirs: the first is taken.",
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["ema", "raw"], "Which weights; the EMA where there are."
)
_TO_TORCH = flags.DEFINE_bool("to-torch", False, "The other way, from JAX to PyTorch.")


def main(arguments: list[str]) -> None:
    problems = [f"no flag in front of {argument}" for argument in arguments[1:]]
    problems += [f"no --{flag.name}=PATH" for flag in (_INPUT, _OUTPUT) if not flag.value]
    if problems:
        raise app.UsageError("; ".join(problems))
    # The libraries' own messages would bury the report.
    logging.set_verbosity(logging.WARNING)
    function = convert.convert_to_torch if _TO_TORCH.value else convert.convert_torch_file
    try:
        function(_INPUT.value, _OUTPUT.value, _MODEL.value, _WEIGHTS.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
