"""The configuration ``cotnet101`` of the package, by its path in a checkout."""

from cotnet_jax.configs.cotnet101 import get_config as get_config
