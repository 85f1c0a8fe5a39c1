"""``cotnet-export``: write a network for ONNX Runtime, or for JAX without this package."""

import pathlib
import sys
from typing import Any

from cotnet_jax import command_line
from cotnet_jax.export import formats

EXAMPLES = (
    "cotnet-export --weights=cotnet50.pth.tar --output=cotnet50.onnx --preprocess",
    "cotnet-export --weights=weights/50 --output=50.onnx --fold --batch_size=1",
    "cotnet-export --weights=runs/digits --output=digits.stablehlo --logits",
)
NOTES = """
Without --preprocess a file takes float32 images [N, size, size, 3], normalised; with it uint8
images [N, H, W, 3] of any size. It returns probabilities [N, classes]. docs/export.md has the lines
that load it.
"""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    command_line.show_warnings()
    try:
        # JAX takes seconds to import: what can be seen before is reported before.
        format = formats.find_format(pathlib.Path(options.output), options.format)
        from cotnet_jax.commands.compilation_cache import keep_compiled_programs
        from cotnet_jax.data import class_names
        from cotnet_jax.export import Options, export_file

        keep_compiled_programs()
        export_file(
            options.weights,
            options.output,
            format,
            Options(options.fold, options.preprocess, options.batch_size, options.logits),
            kind=options.kind,
            model=options.model,
            names=class_names.read_names(options.classes) if options.classes else None,
            image_size=options.image_size,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parse(arguments: list[str] | None = None) -> Any:
    """Return the options, or exit with an error."""
    return make_parser().parse_args(arguments)


def make_parser() -> command_line.Parser:
    """Define the options."""
    parser = command_line.Parser(
        "Write a network with its weights for ONNX Runtime, or for JAX without this package.",
        EXAMPLES,
        notes=NOTES,
    )
    command_line.add_weights(
        parser,
        "A converted folder, a training run's workdir or one of its checkpoints/STEP, or a "
        ".pth.tar, .pth or .safetensors file.",
        required=True,
    )
    parser.add_argument(
        "--output",
        type=command_line.path,
        metavar="FILE",
        required=True,
        help="The file to create, .stablehlo or .onnx.",
    )
    parser.add_argument(
        "--format", choices=formats.FORMATS, help="By default that of the output's suffix."
    )
    parser.add_argument(
        "--fold", action="store_true", help="Fold batch normalisations into the convolutions."
    )
    parser.add_argument(
        "--preprocess",
        action="store_true",
        help="Take uint8 images of any size; resize, crop and normalise them inside.",
    )
    parser.add_argument(
        "--batch_size",
        type=command_line.positive,
        metavar="N",
        help="Take exactly N images; by default any number.",
    )
    parser.add_argument(
        "--logits", action="store_true", help="Return logits in place of probabilities."
    )
    parser.add_argument(
        "--image_size",
        type=command_line.positive,
        metavar="PIXELS",
        help="Side of the network's input; by default that of the weights.",
    )
    command_line.add_model(parser)
    command_line.add_classes(parser)
    return parser
