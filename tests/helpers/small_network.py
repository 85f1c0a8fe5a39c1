"""A network that compiles in a second, for tests of all that is around a network.

    python tests/helpers/small_network.py --config=... --workdir=...

is main.py with it in place of the network that the configuration names.
"""

import runpy
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from configs import digits
from cotnet_jax.layers import BatchNorm
from cotnet_jax.reports import curves
from cotnet_jax.training import setup


class Small(nn.Module):
    """One convolution with its batch norm, pooled and classified; attributes as of CoTNet."""

    num_classes: int = 10
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    freeze_batch_norm: bool = False
    bn_axis_name: str | None = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(128, (3, 3), strides=4, name="conv")(images)
        norm = BatchNorm(use_running_average=not train, frozen=self.freeze_batch_norm, name="bn")
        return nn.Dense(self.num_classes, name="head")(nn.relu(norm(x)).mean((1, 2)))


def create_small(
    name: str, *, num_classes: int, dtype, freeze_batch_norm: bool = False, **_
) -> Small:
    """Takes the place of ``cotnet_jax.models.cotnet.create_model``."""
    del name
    return Small(num_classes=num_classes, dtype=dtype, freeze_batch_norm=freeze_batch_norm)


def short_digits_config() -> ml_collections.ConfigDict:
    """A run of three epochs of four steps on the digits, for this network."""
    config = digits.get_config()
    config.epochs = 3
    config.schedule.warmup_epochs = 1
    config.batch_size = config.eval.batch_size = 8
    config.data.image_size = 8
    config.data.train_split, config.data.eval_split = "train[:32]", "test[:12]"
    return config


if __name__ == "__main__":
    setup.create_model = create_small
    # Takes longer than the rest; tests/end_to_end/test_train.py looks for it.
    curves.write_after_training = lambda workdir: None
    runpy.run_path(str(Path(__file__).parents[2] / "main.py"), run_name="__main__")
