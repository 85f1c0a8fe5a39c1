"""Weights of any network, all of whose parameters and statistics matter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model: nn.Module, image_size: int) -> dict[str, dict]:
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    random = np.random.default_rng(0)

    def fill(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            value = random.uniform(0.5, 1.5, leaf.shape)
        elif name == "kernel":
            value = random.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            value = 0.3 * random.standard_normal(leaf.shape)
        return value.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
