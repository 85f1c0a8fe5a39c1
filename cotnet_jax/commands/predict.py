"""``cotnet-predict``: classify images, or write their features.

Images are prepared exactly as in evaluation: resized and cropped to the model's own size, with
its own filter.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cotnet_jax import command_line, files

EXAMPLES = (
    "cotnet-predict --weights=cotnet50.pth.tar cat.jpg",
    "cotnet-predict --weights=weights/cotnet50 --embeddings=holidays.npy holidays/",
    "cotnet-predict --weights=runs/digits --kind=raw --json holidays/",
)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    command_line.print_any_name()
    command_line.show_warnings()
    # JAX takes seconds to import: wrong options are reported before that.
    from cotnet_jax.commands.compilation_cache import keep_compiled_programs
    from cotnet_jax.data import class_names
    from cotnet_jax.predictor import Predictor, find_images

    try:
        paths = find_images(options.images)
        names = class_names.read_names(options.classes) if options.classes else None
        keep_compiled_programs()
        predictor = Predictor.load(options.weights, options.kind, options.model, names)
        if options.embeddings:
            results = predictor.embed_files(paths, options.batch_size)
        else:
            results = predictor.predict_files(paths, options.top, options.batch_size)
        single_batch = len(paths) <= options.batch_size
        results = tqdm(results, total=len(paths), unit="image", disable=single_batch)
        if options.embeddings:
            errors = write_embeddings(results, Path(options.embeddings))
        else:
            errors = print_results(results, options.json)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if errors:
        done = "embedded" if options.embeddings else "classified"
        sys.exit(
            f"error: {len(errors)} of {len(paths)} images could not be {done}:\n  "
            + "\n  ".join(errors)
        )


def print_results(results: Iterable[Mapping[str, Any]], as_json: bool) -> list[str]:
    """Print the results of ``Predictor.predict_files``, and return a line for each error."""
    errors = []
    for result in results:
        if "error" in result:
            errors.append(f"{result['path']}: {result['error']}")
        if as_json:
            tqdm.write(json.dumps(result, allow_nan=False))
        elif "top" in result:
            tqdm.write(format_result(result))
    return errors


def write_embeddings(results: Iterable[Mapping[str, Any]], file: Path) -> list[str]:
    """Write the results of ``Predictor.embed_files``, and return a line for each error.

    Args:
      results: read one by one; what has an error gets no row.
      file: float32 [images, channels]; the images' paths, a JSON list, lie beside it.

    Raises:
      ValueError: no image could be embedded; lists why.
      OSError: the files could not be written. Then neither is there.
    """
    # NumPy takes a moment to import, which `--help` need not wait for.
    from cotnet_jax.files.npy import writing_rows

    paths, errors = [], []
    with (
        files.writing_whole(paths_file(file)) as unfinished,
        writing_rows(file) as append_row,
    ):
        for result in results:
            if "error" in result:
                errors.append(f"{result['path']}: {result['error']}")
                continue
            append_row(result["embedding"])
            paths.append(result["path"])
        if not paths:
            raise ValueError("\n  ".join(["no image could be embedded:", *errors]))
        unfinished.write_text(json.dumps(paths, indent=0) + "\n", encoding="utf-8")
    print(f"{len(paths)} rows of features are in {file}, their paths in {paths_file(file)}")
    return errors


def paths_file(file: Path) -> Path:
    """Return the name of the list of paths that lies beside embeddings."""
    return file.with_suffix(".json")


def parse(arguments: list[str] | None = None) -> Any:
    """Return the options, or exit with an error."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.embeddings:
        _check_embeddings(parser, options)
    return options


def _check_embeddings(parser: command_line.Parser, options: Any) -> None:
    file = Path(options.embeddings)
    typed = f"--embeddings={file}"
    if file.suffix != ".npy":
        parser.error(f"{typed}: must end in .npy")
    if not file.parent.is_dir():
        parser.error(f"{typed}: there is no folder {file.parent}")
    for output in (file, paths_file(file)):
        if output.exists():
            parser.error(f"{typed}: {output} exists, delete it or give another file")
    if options.json or options.classes:
        parser.error(f"{typed} writes features, no classes: leave out --json and --classes")


def make_parser() -> command_line.Parser:
    """Define the options."""
    parser = command_line.Parser(
        "Classify images by a trained model, or write their features.",
        EXAMPLES,
        replaced={"--which": "--kind=ema|raw"},
    )
    command_line.add_weights(
        parser,
        "A converted folder, a training run's workdir or one of its checkpoints/STEP, a "
        ".pth.tar, .pth, .safetensors or .h5 file, or hf-hub:OWNER/NAME.",
        required=True,
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        required=True,
        help="Image files, or folders of them.",
    )
    command_line.add_model(parser)
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
        help="Images processed together (%(default)s).",
    )
    command_line.add_classes(parser)
    parser.add_argument(
        "--json", action="store_true", help="Print a JSON object on one line for each image."
    )
    parser.add_argument(
        "--embeddings",
        type=command_line.path,
        metavar="FILE.npy",
        help="Write the features that the classifier takes, float32 [images, channels], and the "
        "paths as FILE.json; no classes are printed.",
    )
    return parser


def format_result(result: Mapping[str, Any]) -> str:
    """Format a result of ``Predictor.predict_files`` as text, a class on each line."""
    lines = [result["path"]]
    lines += [f"  {100 * c['probability']:6.2f} %  {c['name']}" for c in result["top"]]
    return "\n".join(lines)
