"""cotnext50_2x48d on ImageNet: 350 epochs, global batch 512.

    cotnet-train --config=cotnext50_2x48d --workdir=DIR --config.data.data_dir=DATA_DIR

Needs imagenet2012 in ArrayRecord under DATA_DIR (cotnet-prepare imagenet).
Published top-1 with these settings, by the PyTorch original: 82.1 %; not yet reproduced with this
project.
"""

from cotnet_jax.configs import default


def get_config():
    config = default.get_config()
    config.model.name = "cotnext50_2x48d"
    config.batch_size = 512
    config.schedule.peak = 0.2
    return config
