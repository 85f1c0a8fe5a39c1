"""The commands, a module each; ``cotnet-NAME`` and ``python -m cotnet_jax NAME`` run them.

A module has ``main(arguments=None)``, which runs the command, and ``parse(arguments=None)``, which
returns its options or exits with an error. A new command is such a module, a line in ``SUMMARIES``
and a line in pyproject.toml.
"""

# Name: what it does, as ``python -m cotnet_jax`` lists it.
SUMMARIES = {
    "prepare": "Prepare ImageNet or a folder of images for training.",
    "train": "Train a CoTNet, fine-tune one, or continue a run.",
    "evaluate": "Measure the accuracy of a run or of given weights, and write a report.",
    "plot": "Draw the curves of a run, or compare runs.",
    "predict": "Classify images.",
    "convert": "Convert PyTorch or Keras weights for JAX, and back to PyTorch.",
    "export": "Write a network for ONNX Runtime, or for JAX alone.",
    "benchmark": "Measure the speed of a training step.",
}
