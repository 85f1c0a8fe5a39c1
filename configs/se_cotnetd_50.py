"""The configuration ``se_cotnetd_50`` of the package, by its path in a checkout."""

from cotnet_jax.configs.se_cotnetd_50 import get_config as get_config
