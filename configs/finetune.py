"""The configuration ``finetune`` of the package, by its path in a checkout."""

from cotnet_jax.configs.finetune import get_config as get_config
