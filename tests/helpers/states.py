"""Train states for tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cotnet_jax.checkpoint.train_state import TrainState


def make_state(step: int, *, ema: bool = True, width: int = 8) -> TrainState:
    """A small state whose every leaf holds numbers that depend on the step alone."""
    rng = np.random.default_rng(step)

    def fill(tree):
        return jax.tree.map(
            lambda x: jnp.asarray(100 * rng.standard_normal(x.shape), x.dtype), tree
        )

    params = fill(
        {
            "stem": {"kernel": jnp.zeros((3, 3, 3, width)), "bias": jnp.zeros(width)},
            "fc": {"kernel": jnp.zeros((width, 10), jnp.bfloat16)},
        }
    )
    batch_stats = fill({"stem": {"mean": jnp.zeros(width), "var": jnp.zeros(width)}})
    optimizer = optax.chain(
        optax.masked(
            optax.add_decayed_weights(1e-4), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
        optax.sgd(optax.constant_schedule(0.1), momentum=0.9, nesterov=True),
    )
    return TrainState(
        step=jnp.int32(step),
        params=params,
        batch_stats=batch_stats,
        ema=fill({"params": params, "batch_stats": batch_stats}) if ema else None,
        opt_state=fill(optimizer.init(params)),
        key=jax.random.key_data(jax.random.key(7)),
    )


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
