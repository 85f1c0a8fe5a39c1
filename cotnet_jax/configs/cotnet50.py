"""cotnet50 on ImageNet: 350 epochs, global batch 640.

    cotnet-train --config=cotnet50 --workdir=DIR --config.data.data_dir=DATA_DIR

Needs imagenet2012 in ArrayRecord under DATA_DIR (cotnet-prepare imagenet).
Published top-1 with these settings, by the PyTorch original: 81.3 %; not yet reproduced with this
project.
"""

from cotnet_jax.configs import default


def get_config():
    return default.get_config()
