"""cotnet101 on ImageNet: 350 epochs, global batch 448.

    cotnet-train --config=cotnet101 --workdir=DIR --config.data.data_dir=DATA_DIR

Needs imagenet2012 in ArrayRecord under DATA_DIR (cotnet-prepare imagenet).
Published top-1 with these settings, by the PyTorch original: 82.8 %; not yet reproduced with this
project.
"""

from cotnet_jax.configs import default


def get_config():
    config = default.get_config()
    config.model.name = "cotnet101"
    config.batch_size = 448
    config.schedule.peak = 0.175
    config.optimizer.weight_decay = 6e-05
    return config
