"""se_cotnetd_50 on ImageNet: 350 epochs, global batch 640.

    cotnet-train --config=se_cotnetd_50 --workdir=DIR --config.data.data_dir=DATA_DIR

Needs imagenet2012 in ArrayRecord under DATA_DIR (cotnet-prepare imagenet).
Published top-1 with these settings, by the PyTorch original: 81.6 %; not yet reproduced with this
project.
"""

from cotnet_jax.configs import default


def get_config():
    config = default.get_config()
    config.model.name = "se_cotnetd_50"
    return config
