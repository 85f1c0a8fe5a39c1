"""The configuration ``cotnext50_2x48d`` of the package, by its path in a checkout."""

from cotnet_jax.configs.cotnext50_2x48d import get_config as get_config
