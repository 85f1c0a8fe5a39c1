"""The configuration ``cotnet50`` of the package, by its path in a checkout."""

from cotnet_jax.configs.cotnet50 import get_config as get_config
