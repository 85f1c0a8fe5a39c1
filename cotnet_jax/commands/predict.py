"""``cotnet-predict``: classify images.

Images are prepared exactly as in evaluation: resized and cropped to the model's own size, with
its own filter.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from absl import logging
from tqdm import tqdm

from cotnet_jax import command_line

EXAMPLES = (
    "cotnet-predict --weights=cotnet50.pth.tar cat.jpg",
    "cotnet-predict --weights=weights/cotnet50 --top=1 cat.jpg holidays/",
    "cotnet-predict --weights=runs/digits --kind=raw --json holidays/",
)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    command_line.print_any_name()
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    # JAX takes seconds to import: wrong options are reported before that.
    from cotnet_jax.data import class_names
    from cotnet_jax.predictor import Predictor, find_images

    try:
        paths = find_images(options.images)
        names = class_names.read_names(options.classes) if options.classes else None
        predictor = Predictor.load(options.weights, options.kind, options.model, names)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    results = predictor.predict_files(paths, options.top, options.batch_size)
    single_batch = len(paths) <= options.batch_size
    errors = []
    for result in tqdm(results, total=len(paths), unit="image", disable=single_batch):
        if "error" in result:
            errors.append(f"{result['path']}: {result['error']}")
        if options.json:
            tqdm.write(json.dumps(result, allow_nan=False))
        elif "top" in result:
            tqdm.write(format_result(result))
    if errors:
        sys.exit(
            f"error: {len(errors)} of {len(paths)} images could not be classified:\n  "
            + "\n  ".join(errors)
        )


def parse(arguments: list[str] | None = None) -> Any:
    """Return the options, or exit with an error."""
    return make_parser().parse_args(arguments)


def make_parser() -> command_line.Parser:
    """Define the options."""
    parser = command_line.Parser(
        "Classify images by a trained model.", EXAMPLES, replaced={"--which": "--kind=ema|raw"}
    )
    command_line.add_weights(
        parser,
        "A converted folder, a training run's workdir or one of its checkpoints/STEP, or a "
        ".pth.tar, .pth or .safetensors file.",
        required=True,
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        required=True,
        help="Image files, or folders of them.",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="Name of the model, if a PyTorch file fits several."
    )
    parser.add_argument(
        "--top",
        type=command_line.positive,
        metavar="N",
        default=5,
        help="Classes printed for each image (%(default)s).",
    )
    parser.add_argument(
        "--batch_size",
        type=command_line.positive,
        metavar="N",
        default=32,
        help="Images classified together (%(default)s).",
    )
    parser.add_argument(
        "--classes",
        type=command_line.path,
        metavar="FILE",
        help="Names of the classes, one on each line; by default those of the weights.",
    )
    parser.add_argument(
        "--json", action="store_true", help="Print a JSON object on one line for each image."
    )
    return parser


def format_result(result: Mapping[str, Any]) -> str:
    """Format a result of ``Predictor.predict_files`` as text, a class on each line."""
    lines = [result["path"]]
    lines += [f"  {100 * c['probability']:6.2f} %  {c['name']}" for c in result["top"]]
    return "\n".join(lines)
