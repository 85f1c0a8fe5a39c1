"""Says what is on images.

    python -m cotnet_jax.predict --weights=cotnet50 cat.jpg dog.jpg holidays/

``--weights`` takes a folder of convert_torch_weights.py, the workdir of a training run, or a file
of PyTorch. Images are prepared exactly as in evaluation: the short side resized, the centre
cropped, with the model's own size and filter.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags, logging
from tqdm import tqdm

from cotnet_jax.data import class_names
from cotnet_jax.predictor import Predictor, find_images

_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "A folder of convert_torch_weights.py, the workdir of a training run, or a .pth.tar, .pth or "
    ".safetensors file.",
)
_WHICH = flags.DEFINE_enum("which", None, ["ema", "raw"], "Which weights; the EMA where there are.")
_MODEL = flags.DEFINE_string("model", None, "Name of the model, if a PyTorch file fits several.")
_TOP = flags.DEFINE_integer("top", 5, "Classes told of each image.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1)
_CLASSES = flags.DEFINE_string("classes", None, "File with the name of a class on each line.")
_JSON = flags.DEFINE_bool("json", False, "A JSON object on a line for each image.")


def _text(result: Mapping[str, Any]) -> str:
    lines = [result["path"]]
    lines += [f"  {100 * c['probability']:6.2f} %  {c['name']}" for c in result["top"]]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    missing = ["no --weights=PATH"] * (not _WEIGHTS.value)
    missing += ["no images or folders of images"] * (len(arguments) < 2)
    if missing:
        raise app.UsageError("; ".join(missing))
    try:
        paths = find_images(arguments[1:])
        names = class_names.read_names(_CLASSES.value) if _CLASSES.value else None
        predictor = Predictor.load(_WEIGHTS.value, _WHICH.value, _MODEL.value, names)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    results = predictor.predict_files(paths, _TOP.value, _BATCH_SIZE.value)
    few = len(paths) <= _BATCH_SIZE.value
    errors = []
    for result in tqdm(results, total=len(paths), unit="image", disable=few):
        if "error" in result:
            errors.append(f"{result['path']}: {result['error']}")
        if _JSON.value:
            tqdm.write(json.dumps(result))
        elif "top" in result:
            tqdm.write(_text(result))
    if errors:
        sys.exit(f"error: {len(errors)} of {len(paths)} not read:\n  " + "\n  ".join(errors))


if __name__ == "__main__":
    app.run(main)
