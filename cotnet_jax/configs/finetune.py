r"""Fine-tune trained weights on images of your own: a new classifier, AdamW, 10 epochs.

    cotnet-prepare folder --source=IMAGES --output=FOLDER --validation=0.2
    cotnet-train --config=finetune --weights=weights/cotnet50 \
        --config.data.name=FOLDER --workdir=DIR

The weights are a converted folder, the workdir of a run or a PyTorch file. For another network than
cotnet50 add --config.model.name=NAME, and its image size. docs/finetuning.md has more.
"""

from cotnet_jax.configs import default


def get_config():
    config = default.get_config()
    config.epochs = 10
    config.batch_size = 32
    config.eval.batch_size = 64
    config.model.drop_path_rate = 0.0
    config.finetune.new_head = True
    config.finetune.rate_multipliers = "head=10"

    # To be named; ImageNet is not what most have.
    config.data.name = ""

    # Weak augmentation: few images are seen for a short time.
    config.augment.scale = (0.5, 1.0)
    config.augment.randaugment = ""
    config.augment.color_jitter = 0.2
    config.mixing.probability = 0.0

    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.schedule.unit = "step"
    config.schedule.warmup_epochs = 1
    config.schedule.warmup_start = 0.0
    config.schedule.peak = 5e-4
    config.schedule.final = 0.0
    config.ema.decay = 0.999
    config.ema.warmup = True

    config.checkpoint.keep_best = 1
    config.log_every_steps = 10
    return config
