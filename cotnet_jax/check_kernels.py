"""Compares whole models with and without the GPU kernels, on this machine's NVIDIA GPU.

    python -m cotnet_jax.check_kernels [--models=cotnet50,cotnext50_2x48d] [--size=224] [--batch=8]
        [--dtypes=float32,bfloat16] [--passes=logits,gradients]

prints, for each model and dtype, the relative L2 difference of the logits in evaluation, and of
all gradients of a training step, between the kernels and XLA's form. Expected: 1e-5 in float32
with full-precision matrix products (the script asks for them), 5e-2 in bfloat16, where both forms
round every activation.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from cotnet_jax.layers import aggregation_dispatch
from cotnet_jax.models import create_model, list_models


def random_variables(model, images, seed=0):
    """Parameters and running statistics of moderate size, without compiling ``model.init``."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = random.standard_normal(leaf.shape)
        name = path[-1].key
        if name == "kernel":
            array = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        elif name == "scale" and path[-2].key == "bn3":
            # Small residual branches: large ones amplify rounding a thousandfold by the last block.
            array = 0.1 * (1 + 0.1 * noise)
        elif name in ("scale", "var"):
            array = 1 + 0.1 * np.abs(noise)
        else:
            array = 0.1 * noise
        return jnp.asarray(array, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def difference(got, expected) -> float:
    """Relative L2 norm over all leaves together."""
    square = total = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        square += np.sum(np.square(a - b))
        total += np.sum(np.square(b))
    return float(np.sqrt(square / total))


def outputs(model, name, variables, images, labels, kernels: bool):
    """Logits in evaluation, or the parameters' gradients in training, with or without kernels."""

    model = model.clone(implementation="triton" if kernels else "xla", fused=kernels)

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), -1))

    def logits(params):
        return model.apply({**variables, "params": params}, images)

    function = jax.jit(logits if name == "logits" else jax.grad(loss))
    return jax.block_until_ready(function(variables["params"]))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(list_models()), help="by comma")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=8, help="pictures")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="by comma")
    parser.add_argument("--passes", default="logits,gradients", help="by comma")
    options = parser.parse_args(arguments)
    if not aggregation_dispatch.kernel_available():
        needs = f"they need an NVIDIA GPU and {aggregation_dispatch.INSTALL}"
        parser.exit(1, f"no kernels to check: {needs}\n")
    jax.config.update("jax_default_matmul_precision", "highest")
    random = np.random.default_rng(1)
    images = random.standard_normal((options.batch, options.size, options.size, 3))
    labels = jax.nn.one_hot(random.integers(0, 1000, options.batch), 1000)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {images.shape}")
    for name in options.models.split(","):
        for dtype in options.dtypes.split(","):
            model = create_model(name, dtype=jnp.dtype(dtype))
            batch = jnp.asarray(images, dtype)
            variables = random_variables(model, batch)
            for kind in options.passes.split(","):
                start = time.monotonic()
                arrays = [
                    outputs(model, kind, variables, batch, labels, kernels)
                    for kernels in (True, False)
                ]
                print(
                    f"{name:20} {dtype:9} {kind:10} {difference(*arrays):.1e}   "
                    f"({time.monotonic() - start:.0f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
