"""A small CoTNet learns scikit-learn's 1,797 handwritten digits, on any computer.

    cotnet-train --config=digits --workdir=runs/digits

Needs no download: the images are in scikit-learn, and are written as a TFDS dataset once.
"""

from cotnet_jax.configs import default


def get_config():
    config = default.get_config()
    config.epochs = 15
    config.batch_size = 64

    config.model.name = "cotnet_tiny"
    config.model.drop_rate = 0.0
    config.model.drop_path_rate = 0.0

    config.data.name = "digits"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.crop = 1.0
    # Images of 8 x 8 pixels: processes would take longer to start than to decode all of them.
    config.data.num_workers = 0
    config.data.num_threads = 2

    # A digit mirrored or cut in half is another sign, so augmentation is gentle.
    config.augment.scale = (0.7, 1.0)
    config.augment.flip = 0.0
    config.augment.randaugment = ""
    config.augment.color_jitter = 0.0

    config.mixing.probability = 0.5
    config.schedule.peak = 0.1
    config.schedule.warmup_epochs = 2
    config.ema.decay = 0.95
    config.eval.batch_size = 360
    config.checkpoint.keep_best = 1
    config.log_every_steps = 22
    return config
