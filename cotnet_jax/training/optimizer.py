"""The recipe's optimizer, learning rate and EMA."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax


def learning_rates(schedule: ml_collections.ConfigDict, epochs: int, batch_size: int) -> np.ndarray:
    """Return the learning rate of every epoch, float64 [epochs].

    Linear from ``warmup_start`` over ``warmup_epochs``, then a half cosine over all epochs down
    to ``final`` (Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts); constant
    within an epoch, as the published models were trained. With ``base_batch_size`` the rates are
    for batches of that size, and are multiplied by batch_size / base_batch_size (Goyal et al.,
    arXiv 1706.02677, section 2.1).

    Args:
      schedule: the section ``schedule``.
      epochs: length of the run.
      batch_size: images a step, over all devices.
    """
    epoch = np.arange(epochs, dtype=np.float64)
    slope = (schedule.peak - schedule.warmup_start) / max(schedule.warmup_epochs, 1)
    cosine = 0.5 * (1 + np.cos(np.pi * epoch / epochs))
    rates = np.where(
        epoch < schedule.warmup_epochs,
        schedule.warmup_start + epoch * slope,
        schedule.final + (schedule.peak - schedule.final) * cosine,
    )
    return rates * (batch_size / schedule.base_batch_size if schedule.base_batch_size else 1)


def ema_step_size_schedule(ema: ml_collections.ConfigDict) -> optax.Schedule:
    """Return the schedule steps done -> weight of the new values in the EMA: 1 - decay.

    With ``warmup`` the decay is at most (1 + n) / (10 + n) after n steps, as in TensorFlow's
    ExponentialMovingAverage with num_updates: a young EMA soon forgets the initial weights.

    Args:
      ema: the section ``ema``.
    """
    if not ema.warmup:
        return optax.constant_schedule(1 - ema.decay)
    return lambda step: jnp.maximum(1 - ema.decay, 9 / (10 + step))


def weight_decay_mask(params) -> dict:
    """Return True for each parameter with weight decay: kernels, of two or more dimensions."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_optimizer(
    config: ml_collections.ConfigDict, rates: np.ndarray, steps_per_epoch: int
) -> optax.GradientTransformation:
    """Return SGD with Nesterov momentum: g += wd * p; v = m * v + g; p -= rate * (g + m * v).

    Args:
      config: the section ``optimizer``.
      rates: learning rate of every epoch.
      steps_per_epoch: optimizer steps in an epoch.
    """
    table = jnp.asarray(rates)

    def rate(step):
        return table[step // steps_per_epoch]

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, mask=weight_decay_mask),
        optax.trace(config.momentum, nesterov=True),
        optax.scale_by_learning_rate(rate),
    )
