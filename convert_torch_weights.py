"""Converts PyTorch weights of a CoTNet for JAX, and back.

    python convert_torch_weights.py --input=cotnet50.pth.tar --output=cotnet50
    python convert_torch_weights.py --to-torch --input=cotnet50 --output=cotnet50.safetensors

Neither needs PyTorch, and nothing in the file is executed.
"""

import sys

from absl import app, flags, logging

from cotnet_jax import convert

_INPUT = flags.DEFINE_string(
    "input",
    None,
    "A .pth.tar, .pth or .safetensors file; with --to-torch also a converted folder or the "
    "workdir of a training run.",
    required=True,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to make; with --to-torch a .safetensors file.", required=True
)
_MODEL = flags.DEFINE_string(
    "model", None, "Name of the model; found by the names and shapes of the tensors if left out."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["ema", "raw"], "Which weights; the moving averages (EMA) where there are."
)
_TO_TORCH = flags.DEFINE_bool("to_torch", False, "The other way, from JAX to PyTorch.")
flags.DEFINE_alias("to-torch", "to_torch")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"flags are --name=value; what is {arguments[1]}?")
    # The libraries' own messages would bury the report.
    logging.set_verbosity(logging.WARNING)
    function = convert.convert_to_torch if _TO_TORCH.value else convert.convert_torch_file
    try:
        function(_INPUT.value, _OUTPUT.value, _MODEL.value, _WEIGHTS.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
