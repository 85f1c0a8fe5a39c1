"""The optimizer, its learning rates, and the EMA's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from cotnet_jax.models import parameter_names
from cotnet_jax.models.parameter_names import HEAD


def learning_rates(
    schedule: ml_collections.ConfigDict, periods: int, batch_size: int, *, warmup: int
) -> np.ndarray:
    """Return the learning rate of every period of a run, float64 [periods].

    Linear from ``warmup_start`` over the warm-up, then a half cosine over all periods down to
    ``final`` (Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts). The published
    models were trained with a rate that is constant within an epoch. With ``base_batch_size`` the
    rates are for batches of that size, and are multiplied by batch_size / base_batch_size (Goyal et
    al., arXiv 1706.02677, section 2.1).

    Args:
      schedule: the section ``schedule``.
      periods: length of the run, in epochs or steps.
      batch_size: images a step, over all devices.
      warmup: length of the warm-up, in periods.
    """
    period = np.arange(periods, dtype=np.float64)
    slope = (schedule.peak - schedule.warmup_start) / max(warmup, 1)
    cosine = 0.5 * (1 + np.cos(np.pi * period / periods))
    rates = np.where(
        period < warmup,
        schedule.warmup_start + period * slope,
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
    config: ml_collections.ConfigDict,
    rates: np.ndarray,
    steps_per_rate: int,
    *,
    rate_multipliers: Mapping[str, float] | None = None,
    head_first: bool = False,
) -> optax.GradientTransformation:
    """Return the optimizer that a configuration names.

    SGD with Nesterov momentum: g += wd * p; v = m * v + g; p -= rate * (g + m * v). Or AdamW
    (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2): p -= rate * (m1 / (sqrt(m2) + eps) +
    wd * p), with bias-corrected moments.

    Args:
      config: the section ``optimizer``.
      rates: learning rate of every period.
      steps_per_rate: optimizer steps in a period.
      rate_multipliers: {name: factor of the rate} of every parameter; None or {}: all 1.
      head_first: keep the state of the head apart from that of the other parameters, so that an
        update may have gradients of the head alone, and those of the others begin at their first.
    """
    table = jnp.asarray(rates)

    def rate(step):
        return table[step // steps_per_rate]

    rule = _sgd(config) if config.name == "sgd" else _adamw(config)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        *([_head_apart(optax.chain(*rule))] if head_first else rule),
        optax.scale_by_learning_rate(rate),
        *([_scale_by_name(rate_multipliers)] if rate_multipliers else []),
    )


def _sgd(config) -> list[optax.GradientTransformation]:
    return [
        optax.add_decayed_weights(config.weight_decay, mask=weight_decay_mask),
        optax.trace(config.momentum, nesterov=True),
    ]


def _adamw(config) -> list[optax.GradientTransformation]:
    return [
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=weight_decay_mask),
    ]


def _scale_by_name(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiply the update of each parameter by its factor."""

    def scale(name, update):
        return update * factors[name]

    return optax.stateless(lambda updates, _: parameter_names.map_named(scale, updates))


def _head_apart(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Give the head and the other parameters states of their own; one without updates stays."""

    def parts(tree):
        head = {name: leaves for name, leaves in tree.items() if name == HEAD}
        others = {name: leaves for name, leaves in tree.items() if name != HEAD}
        return {"head": head, "others": others}

    def init(params):
        return {part: rule.init(tree) for part, tree in parts(params).items()}

    def update(updates, state, params=None):
        new_updates: dict[str, Any] = {}
        new_state, params = dict(state), parts(params)
        for part, tree in parts(updates).items():
            if tree:
                tree, new_state[part] = rule.update(tree, state[part], params[part])
                new_updates |= tree
        return new_updates, new_state

    return optax.GradientTransformation(init, update)
