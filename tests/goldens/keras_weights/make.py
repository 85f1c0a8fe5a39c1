"""Write the files beside this one by keras_cv_attention_models and TensorFlow.

Needs Python 3.11, tensorflow-cpu 2.15.1, and a checkout of
https://github.com/leondgarse/keras_cv_attention_models (687943d) on PYTHONPATH:

    PYTHONPATH=CHECKOUT:tests python tests/goldens/keras_weights/make.py
"""

import json
from pathlib import Path

import numpy as np
from helpers import keras_file_builder as build
from keras_cv_attention_models import cotnet

HERE = Path(__file__).parent
# cotnet_tiny, in the words of that project.
TINY = {
    "num_blocks": [1, 1, 1, 1],
    "strides": [1, 2, 2, 2],
    "out_channels": [64, 128, 256, 512],
    "stem_type": "deep",
    "stem_width": 32,
    "stem_downsample": False,
    "input_shape": (32, 32, 3),
    "model_name": "cotnet_tiny",
}
OPTIONS = {"num_classes": 10, "classifier_activation": None, "pretrained": None}


def main():
    models = [
        cotnet.CotNet(**TINY, **OPTIONS),
        cotnet.CotNet50(input_shape=(64, 64, 3), **OPTIONS),
        cotnet.CotNetSE50D(input_shape=(64, 64, 3), **OPTIONS),
    ]
    for model in models:
        shapes = {
            f"{layer.name}/{weight.name}": tuple(weight.shape)
            for layer in model.layers
            for weight in layer.weights
        }
        (HERE / f"{model.name}.json").write_text(json.dumps(shapes) + "\n")
        if model is models[0]:
            weights = build.weights(shapes)
            for layer in model.layers:
                if layer.weights:
                    layer.set_weights([weights[f"{layer.name}/{w.name}"] for w in layer.weights])
            logits = model(build.images(), training=False).numpy()
            np.savez_compressed(HERE / "cotnet_tiny.npz", logits=logits)


if __name__ == "__main__":
    main()
