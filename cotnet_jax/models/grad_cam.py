"""Grad-CAM: where in an image a layer finds what speaks for a class."""

import collections
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def grad_cam(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Float[Array, "N H W channels"],
    layer: str,
    classes: Int[Array | np.ndarray, " N"] | None = None,
) -> Float[Array, "N h w"]:
    """Return where the output of a layer speaks for a class, in inference.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization", arXiv 1610.02391, equations 1 and 2: each channel of the layer's output counts by
    the mean, over pixels, of the gradient of the class's logit; of their sum the positive part is
    kept.

    Args:
      model: a ``CoTNet``, or any module that maps images to logits [N, num_classes].
      variables: {"params", "batch_stats"} of the model.
      images: [N, H, W, channels], normalised.
      layer: path of a module that returns [N, h, w, C], such as "stage4_block2", or
        "stage1_block0/cot" for its CoT layer.
      classes: [N], indices of logits; None takes the likeliest class of each image.

    Returns:
      [N, h, w] of 0 or more, in at least float32: comparable within an image, without a unit.

    Raises:
      ValueError: there is no such layer, it returns something else, or it is called more than once;
        the message suggests others.
    """
    shapes = _layer_shapes(model, variables, images)
    if layer not in shapes:
        near = difflib.get_close_matches(layer, shapes, n=5, cutoff=0)
        raise ValueError(
            f"grad_cam: no layer {layer!r} that is called once and returns [N, h, w, C]; near are "
            f"{', '.join(map(repr, near)) or 'none'}"
        )
    return _grad_cam(model, layer, shapes[layer], variables, images, classes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _grad_cam(model, layer, output, variables, images, classes):
    def chosen_logits(added):
        """Sum of the classes' logits, when ``added`` is added to what the layer returns."""
        seen = {}

        def add(path, y):
            if path != layer:
                return y
            seen[layer] = y
            return y + added

        logits = _apply(model, variables, images, add)
        index = jnp.argmax(logits, axis=-1) if classes is None else jnp.asarray(classes)
        # An image's logits depend on that image alone: one gradient serves all.
        return jnp.take_along_axis(logits, index[:, None], axis=-1).sum(), seen[layer]

    zeros = jnp.zeros(output.shape, output.dtype)
    gradient, activation = jax.grad(chosen_logits, has_aux=True)(zeros)
    dtype = jnp.promote_types(output.dtype, jnp.float32)
    importance = gradient.astype(dtype).mean((1, 2), keepdims=True)
    return nn.relu((importance * activation.astype(dtype)).sum(-1))


def _apply(model: nn.Module, variables, images, change: Callable[[str, Any], Any]) -> Any:
    """Apply a model with the result y of each of its layers replaced by ``change(path, y)``."""

    def intercept(call, args, kwargs, context):
        y = call(*args, **kwargs)
        return change("/".join(context.module.path), y) if context.method_name == "__call__" else y

    with nn.intercept_methods(intercept):
        return model.apply(variables, images)


def _layer_shapes(model, variables, images) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {path: shape and dtype} of the layers that return [N, h, w, C] in their one call."""
    calls = collections.Counter[str]()
    shapes = {}

    def record(path, y):
        calls[path] += 1
        if isinstance(y, jax.Array) and y.ndim == 4:
            shapes[path] = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return y

    jax.eval_shape(lambda v, x: _apply(model, v, x, record), variables, images)
    return {path: shape for path, shape in shapes.items() if calls[path] == 1}
