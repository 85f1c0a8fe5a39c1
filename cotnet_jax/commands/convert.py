"""``cotnet-convert``: convert weights of a CoTNet for JAX, and back to PyTorch.

Neither needs PyTorch, and nothing in the file is executed.
"""

import sys
from typing import Any

from cotnet_jax import command_line

EXAMPLES = (
    "cotnet-convert --weights=cotnet50.pth.tar --output=weights/cotnet50",
    "cotnet-convert --weights=cotnet50.pth.tar --kind=raw --output=weights/raw",
    "cotnet-convert --to_torch --weights=runs/mine --output=mine.safetensors",
)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    command_line.show_warnings()
    # JAX takes seconds to import: wrong options are reported before that.
    from cotnet_jax.weights import convert

    function = convert.convert_to_torch if options.to_torch else convert.convert_torch_file
    try:
        function(options.weights, options.output, options.model, options.kind)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parse(arguments: list[str] | None = None) -> Any:
    """Return the options, or exit with an error."""
    return make_parser().parse_args(arguments)


def make_parser() -> command_line.Parser:
    """Define the options."""
    parser = command_line.Parser(
        "Convert PyTorch or Keras weights for JAX, and back to PyTorch. Needs neither of them.",
        EXAMPLES,
        notes="A .pth.tar file is converted as it was downloaded, without unpacking it.",
        replaced={"--input": "--weights=PATH", "--to-torch": "--to_torch"},
    )
    command_line.add_weights(
        parser,
        "A .pth.tar, .pth or .safetensors file, a .h5 file of kecam, or hf-hub:OWNER/NAME; with "
        "--to_torch also a converted folder or the workdir of a training run.",
        required=True,
    )
    parser.add_argument(
        "--output",
        type=command_line.path,
        metavar="PATH",
        required=True,
        help="The folder to create; with --to_torch the .safetensors file to create.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="Name of the model, such as cotnet50; by default identified by the names and shapes "
        "of the tensors. se_cotnetd_152 and se_cotnetd_152_L share theirs: the default is the "
        "first.",
    )
    parser.add_argument("--to_torch", action="store_true", help="Convert from JAX to PyTorch.")
    return parser
