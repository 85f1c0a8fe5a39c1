"""Cut scikit-image's photographs into images of five classes, for docs/finetuning.md.

python docs/cut_photographs.py --output=photographs

Training images come from the left two thirds of each photograph, validation images from the rest.
"""

import argparse
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

# Those that travel in the package; the others would be downloaded.
CLASSES = {
    "ground": ("brick", "grass", "gravel"),
    "living": ("astronaut", "camera", "cat"),
    "medicine": ("cell", "immunohistochemistry", "retina"),
    "sky": ("hubble_deep_field", "moon", "rocket"),
    "things": ("coffee", "coins", "stereo_motorcycle"),
}
IMAGES = {"train": 32, "validation": 12}  # of each photograph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    random = np.random.default_rng(0)
    for class_name, photographs in CLASSES.items():
        for name in photographs:
            found = getattr(skimage.data, name)()
            # A stereo pair comes with its disparities.
            photograph = Image.fromarray(found[0] if isinstance(found, tuple) else found)
            for split, count in IMAGES.items():
                folder = output / split / class_name / name
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    cut(photograph, split, random).save(folder / f"{number}.png")


def cut(photograph: Image.Image, split: str, random: np.random.Generator) -> Image.Image:
    """Return a square of a quarter of the short side, from the split's part of a photograph."""
    width, height = photograph.size
    side, border = min(width, height) // 4, 2 * width // 3
    first, last = (0, border - side) if split == "train" else (border, width - side)
    left, top = int(random.integers(first, last)), int(random.integers(height - side))
    return photograph.crop((left, top, left + side, top + side))


if __name__ == "__main__":
    main()
