"""The configuration ``digits`` of the package, by its path in a checkout."""

from cotnet_jax.configs.digits import get_config as get_config
