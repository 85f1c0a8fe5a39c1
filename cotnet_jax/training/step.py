"""One optimizer step, from a batch of uint8 images to the new state."""

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cotnet_jax.checkpoint.train_state import TrainState
from cotnet_jax.data.normalize import normalize
from cotnet_jax.distributed.sharding import DATA_AXIS, REPLICATED, SHARDED, make_varying
from cotnet_jax.layers.batch_norm import is_frozen
from cotnet_jax.models import parameter_names


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mix: Callable[[jax.Array, dict], tuple[jax.Array, jax.Array]],
    *,
    mesh: Mesh,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    ema_step_size: optax.Schedule,
    accumulate_steps: int,
    frozen: Collection[str] = (),
    extra_metrics: Callable[[dict], dict[str, jax.Array]] | None = None,
) -> jax.stages.Wrapped:
    """Build the pure function (state, batch) -> (state, metrics), jitted; it donates the state.

    Args:
      model: the network; its dtype is that of the normalised images, and the batch statistics of
        its freeze_batch_norm stay as they are.
      optimizer: makes the updates of the parameters that are trained.
      mix: (key, batch) -> images [B, H, W, C] of values 0..255 and soft targets [B, classes], for
        one device's shard of the batch.
      mesh: the devices, over axis "data".
      mean, std: normalisation of the images, on the 0..1 scale.
      ema_step_size: steps done -> weight of the new values in the EMA; unused where the state has
        no EMA.
      accumulate_steps: number of parts that a device processes its shard in, one after the other.
      frozen: names of the parameters that stay as they are, in ``parameter_names``' form.
      extra_metrics: gradients -> further metrics, float scalars; None computes none.

    Returns:
      A function of a replicated TrainState and a batch {"image": [B, H, W, C], "label": [B]},
      sharded over the devices. Its metrics are float scalars: "loss", the mean over the batch,
      "gradient_norm", the global norm before clipping, and "finite", 1 where the new state is
      finite, else 0.
    """

    def loss_fn(trained, constant, batch_stats, images, targets, key):
        params = parameter_names.join(trained, constant)
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, updates["batch_stats"]

    def device_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(DATA_AXIS))
        trained, constant = parameter_names.split(state.params, frozen)
        # Each device differentiates its own copy, so that the mean below is the only exchange.
        own_trained, own_constant = make_varying((trained, constant))

        def add_part(total, part):
            gradients, loss, batch_stats = total
            index, batch = part
            mix_key, dropout_key = jax.random.split(jax.random.fold_in(key, index))
            images, targets = mix(mix_key, batch)
            images = normalize(images, mean, std, model.dtype)
            (part_loss, batch_stats), part_gradients = jax.value_and_grad(loss_fn, has_aux=True)(
                own_trained, own_constant, batch_stats, images, targets, dropout_key
            )
            gradients = jax.tree.map(jnp.add, gradients, part_gradients)
            return (gradients, loss + part_loss, batch_stats), None

        total = (
            jax.tree.map(jnp.zeros_like, own_trained),
            make_varying(jnp.zeros((), model.param_dtype)),
            make_varying(state.batch_stats),
        )
        parts = jax.tree.map(lambda a: a.reshape(accumulate_steps, -1, *a.shape[1:]), batch)
        numbered = (jnp.arange(accumulate_steps), parts)
        if accumulate_steps == 1:
            # On CPUs XLA compiles convolutions inside a loop to code that is 5 times slower.
            total, _ = add_part(total, jax.tree.map(lambda a: a[0], numbered))
        else:
            total, _ = jax.lax.scan(add_part, total, numbered)
        gradients, loss, batch_stats = total
        gradients, loss = jax.tree.map(lambda a: a / accumulate_steps, (gradients, loss))
        gradients, loss, batch_stats = jax.lax.pmean((gradients, loss, batch_stats), DATA_AXIS)
        if model.freeze_batch_norm:
            batch_stats = _keep_frozen(model.freeze_batch_norm, state.batch_stats, batch_stats)

        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        params = parameter_names.join(optax.apply_updates(trained, updates), constant)
        ema_step = ema_step_size(state.step)
        # Written like this, values that do not change, such as frozen statistics, stay exact.
        ema = state.ema and jax.tree.map(
            lambda average, new: average + ema_step * (new - average),
            state.ema,
            {"params": params, "batch_stats": batch_stats},
        )
        state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            ema=ema,
            opt_state=opt_state,
        )
        metrics = {
            "loss": loss,
            "gradient_norm": optax.global_norm(_join(gradients)),
            "finite": _are_finite((params, batch_stats)).astype(loss.dtype),
            **(extra_metrics(gradients) if extra_metrics else {}),
        }
        return state, metrics

    step = jax.shard_map(
        device_step, mesh=mesh, in_specs=(REPLICATED, SHARDED), out_specs=(REPLICATED, REPLICATED)
    )
    return jax.jit(step, donate_argnums=0)


def _keep_frozen(frozen: bool | frozenset[str], old: dict, new: dict) -> dict:
    """Return new batch statistics, but the old ones where they are frozen.

    The mean over devices may have rounded those.
    """

    def choose(name, old, new):
        return old if is_frozen(frozen, name.rpartition("/")[0]) else new

    return parameter_names.map_named(choose, old, new)


def _are_finite(weights: Any) -> jax.Array:
    """Return whether all new weights are finite, and with them the whole new state, bool [].

    Momentum that is not finite leaves no update that is. The EMA moves by a part of the difference
    to the new weights, which stays finite up to half of the dtype's range: that is the limit.
    """
    values = _join(weights)
    return jnp.all(jnp.abs(values) < jnp.finfo(values.dtype).max / 2)


def _join(tree: Any) -> jax.Array:
    """Return all values as one array [n]: reducing hundreds of small ones takes longer on GPUs."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
