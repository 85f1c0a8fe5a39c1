"""The configuration ``default`` of the package, by its path in a checkout."""

from cotnet_jax.configs.default import get_config as get_config
