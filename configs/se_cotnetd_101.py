"""se_cotnetd_101 on ImageNet: 350 epochs, global batch 512.

    python main.py --config=configs/se_cotnetd_101.py --workdir=DIR --config.data.data_dir=DATA_DIR

Needs imagenet2012 in ArrayRecord under DATA_DIR (python -m cotnet_jax.data.prepare imagenet).
Published top-1 with these settings, by the PyTorch original: 83.2 %; not yet reproduced with this
project.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "se_cotnetd_101"
    config.batch_size = 512
    config.schedule.peak = 0.2
    return config
