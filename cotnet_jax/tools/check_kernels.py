"""Check the kernels on this machine's NVIDIA GPU; exit with 1 above a tolerance.

    python -m cotnet_jax.tools.check_kernels shapes [--models=cotnet50,...] [--sizes=224,320]
    python -m cotnet_jax.tools.check_kernels batch_norm [--models=cotnet50,...] [--sizes=224,320]
    python -m cotnet_jax.tools.check_kernels large
    python -m cotnet_jax.tools.check_kernels models [--models=cotnet50,...] [--size=224]
        [--batch_size=32] [--dtypes=float32,bfloat16] [--passes=logits,gradients,smooth]

shapes: at every shape that the models' CoT layers have, the relative L2 error of each result and
gradient of the aggregation against the float64 reference, on random data, in memory that was filled
with NaN before.
batch_norm: the same for every batch normalisation of the models in training, with the 1x1
convolution before it where kernels do both.
large: more than 2^31 values; the first, a middle and the last images are those of a small batch.
models: the relative L2 difference between the kernels and XLA's form, with full-precision matrix
products, of the logits in evaluation and of all gradients of a training step. Rounding moves a
few activations over the kink of a ReLU or to another maximum of a pool, and each changes its
gradient by all of it: a share e of the activations changes the norm by sqrt(e). So the gradients
are held against what XLA's form itself makes of images changed in their last bit, and "smooth"
compares the same networks with SiLU for ReLU and average pools for maximum pools, which have
no kinks. Batch statistics of fewer images amplify rounding more: those of 8 leave 1e-5 in XLA's
own float32 gradients of some models. In bfloat16 every activation is rounded, and XLA's form
against its float32 says how much that alone changes.
"""

import contextlib
import functools
import sys
import time
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cotnet_jax.command_line import Parser, positive, positives
from cotnet_jax.layers import cot, pooling
from cotnet_jax.layers.conv_norm import conv_norm
from cotnet_jax.models import cotnet
from cotnet_jax.models.cotnet import create_model, list_models
from cotnet_jax.ops import dispatch
from cotnet_jax.ops.local_aggregation import (
    local_aggregation,
    normalized_local_aggregation,
    reference,
)
from cotnet_jax.ops.local_aggregation.shapes import MODEL_SHAPES, AggregationShape
from cotnet_jax.tools import batch_norm_checks
from cotnet_jax.tools.benchmark_ops import by_comma, on_poisoned_memory

SHAPE_TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}
MODEL_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
# A gradient may differ by so many times what the images' last bit changes.
LAST_BITS = 5
LARGE_TOLERANCE = 1e-3
IMAGES = 3


def random_variables(model, images, seed=0):
    """Return parameters and running statistics of moderate size, without ``model.init``."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = random.standard_normal(leaf.shape)
        name = path[-1].key
        if name == "kernel":
            array = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        elif name == "scale" and path[-2].key == "bn3":
            # Small residual branches: large ones amplify rounding a thousandfold by the last block.
            array = 0.01 * (1 + 0.1 * noise)
        elif name in ("scale", "var"):
            array = 1 + 0.1 * np.abs(noise)
        else:
            array = 0.1 * noise
        return jnp.asarray(array, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def difference(got, expected) -> float:
    """Return the relative L2 norm over all leaves together."""
    square = total = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        square += np.sum(np.square(a - b))
        total += np.sum(np.square(b))
    return float(np.sqrt(square / total))


def make_program(model, kind, labels, kernels: bool):
    """Return a jitted function of variables and images, with or without kernels.

    It returns logits in evaluation, or the parameters' gradients in training.
    """
    model = model.clone(implementation="triton" if kernels else "xla", fused=kernels)

    def loss(params, variables, images):
        variables = {**variables, "params": params}
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), -1))

    def gradients(variables, images):
        with smooth() if kind == "smooth" else contextlib.nullcontext():
            return jax.grad(loss)(variables["params"], variables, images)

    return jax.jit(model.apply if kind == "logits" else gradients)


@contextlib.contextmanager
def smooth():
    """Trace networks without kinks inside it."""

    def average_pool(x, implementation):
        del implementation
        return nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def without_relu(conv, norm, x, *, activation=None, **options):
        return conv_norm(conv, norm, x, activation=activation and "silu", **options)

    with (
        mock.patch.object(cotnet, "conv_norm", without_relu),
        mock.patch.object(cot, "conv_norm", without_relu),
        mock.patch.object(pooling, "max_pool_3x3", average_pool),
    ):
        yield


def aggregation_shapes(name: str, size: int) -> set[AggregationShape]:
    """Return the sizes of a model's CoT layers, for square images of ``size`` pixels."""
    model = create_model(name)
    images = jnp.zeros((1, size, size, 3))
    init = functools.partial(model.init, mutable=True)
    state = jax.eval_shape(init, jax.random.key(0), images)
    layers: dict[tuple, dict] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["intermediates"]):
        *layer, what, _ = path
        layers.setdefault(tuple(layer), {})[what.key] = leaf
    return {
        AggregationShape.of(arrays["static"], arrays["aggregation_weights"])
        for arrays in layers.values()
        if "aggregation_weights" in arrays
    }


def operations(implementation: str) -> dict:
    """Return functions of values, weights, gradient, scale and bias, output scale and shift.

    Each takes the first few of them, as ``select`` does, and returns the result and gradients.
    """

    def with_gradients(function):
        def both(values, weights, gradient, *parameters):
            value, pullback = jax.vjp(function, values, weights, *parameters)
            return value, *pullback(gradient)

        return both

    plain = functools.partial(local_aggregation, implementation=implementation)
    normalized = functools.partial(normalized_local_aggregation, implementation=implementation)

    def activated(values, weights, gradient, scale, bias, output_scale, output_shift):
        del gradient
        affine = {"output_scale": output_scale, "output_shift": output_shift}
        return (normalized(values, weights, scale, bias, **affine),)

    return {
        "plain": with_gradients(plain),
        "normalized": with_gradients(normalized),
        "activated": activated,
    }


def expected_results(name: str, operands) -> tuple:
    """Return in float64 what the operation of this name returns."""
    wide = [np.asarray(a, np.float64) for a in select(name, operands)]
    if name == "plain":
        return reference.local_aggregation(*wide)
    results = reference.normalized_local_aggregation(*wide)
    return results[:1] if name == "activated" else results


def make_operands(batch: int, shape: AggregationShape, dtype, seed: int = 0) -> list[np.ndarray]:
    """Return random operands of ``operations``; of one dtype but for the scales and shifts."""
    values = (batch, shape.h, shape.w, shape.pixel_values)
    taps = (shape.groups, shape.taps, shape.channels)
    channels = (shape.pixel_values,)
    random = np.random.default_rng(seed)
    shapes = (values, (*values[:3], *taps), values, taps, taps, channels, channels)
    arrays = [random.standard_normal(each, np.float32) for each in shapes]
    return [a.astype(dtype) if a.ndim > 3 else a for a in arrays]


def check_shapes(names, sizes) -> bool:
    """Print the errors of all operations at all shapes; return whether all are within tolerance."""
    shapes = sorted(set().union(*(aggregation_shapes(n, s) for n in names for s in sizes)))
    worst = dict.fromkeys(SHAPE_TOLERANCE, 0.0)
    print("errors of: result, then gradients of values, weights, scale, bias")
    for shape in shapes:
        for dtype in SHAPE_TOLERANCE:
            operands = make_operands(IMAGES, shape, jnp.dtype(dtype))
            for name, function in operations("triton").items():
                device = [jnp.asarray(a) for a in select(name, operands)]
                results, poisoned = on_poisoned_memory(function, device)
                exact = expected_results(name, operands)
                errors = [difference(a, b) for a, b in zip(results, exact, strict=True)]
                worst[dtype] = max(worst[dtype], *errors, key=lambda e: (np.isnan(e), e))
                print(
                    f"{shape!s:22} {dtype:9} {name:10} "
                    + " ".join(f"{error:.1e}" for error in errors)
                    + f"   on NaN: {poisoned} of {len(results)}",
                    flush=True,
                )
    for dtype, error in worst.items():
        print(f"{dtype}: {len(shapes)} shapes, largest error {error:.2e}")
    return all(error <= SHAPE_TOLERANCE[dtype] for dtype, error in worst.items())


def select(name: str, operands) -> list:
    """Return the operands that an operation takes."""
    return [*operands[: {"plain": 3, "normalized": 5, "activated": 7}[name]]]


def check_large() -> bool:
    """Run more than 2^31 values through all operations, at the first shape of cotnet50."""
    shape, ends = MODEL_SHAPES["cotnet50"][0], 2
    batch = 2**31 // (shape.h * shape.w * shape.pixel_values) + 8

    def around(array, middle):
        """Return ``ends`` images, so many of zeros, and ``ends`` other images."""
        array = jnp.asarray(array)
        if array.ndim < 4:
            return array
        zeros = jnp.zeros((middle, *array.shape[1:]), array.dtype)
        return jnp.concatenate([array[:ends], zeros, array[ends:]])

    good = True
    for name, function in operations("triton").items():
        program = jax.jit(function)
        operands = select(name, make_operands(2 * ends, shape, jnp.bfloat16))
        expected = program(*(around(a, 1) for a in operands))
        results = program(*(around(a, batch - 2 * ends) for a in operands))
        for number, (array, wanted) in enumerate(zip(results, expected, strict=True)):
            if array.ndim < 4:
                # A gradient of scale or bias, summed over all images.
                error = difference(array, wanted)
            else:
                # The middle's images are all alike.
                equal = jnp.all(array[ends:-ends] == wanted[ends])
                outer = difference((array[:ends], array[-ends:]), (wanted[:ends], wanted[-ends:]))
                error = outer if equal else np.inf
            good &= error <= LARGE_TOLERANCE
            print(f"{name:10} result {number}: {array.size:,} elements, error {error:.1e}")
    for name, error in batch_norm_checks.large_errors():
        good &= error <= LARGE_TOLERANCE
        print(f"batch norm, {name}: error {error:.1e}", flush=True)
    return good


def check_models(names, size, batch, dtypes, passes) -> bool:
    """Print the differences of whole models; return whether all are within tolerance."""
    jax.config.update("jax_default_matmul_precision", "highest")
    random = np.random.default_rng(1)
    images = random.standard_normal((batch, size, size, 3), np.float32)
    labels = jax.nn.one_hot(random.integers(0, 1000, batch), 1000)
    good = True
    for name in names:
        for kind in passes:
            exact = None
            for dtype in dtypes:
                start = time.monotonic()
                model = create_model(name, dtype=jnp.dtype(dtype))
                variables = random_variables(model, images)
                batch_images = jnp.asarray(images, dtype)
                kernels = make_program(model, kind, labels, True)(variables, batch_images)
                program = make_program(model, kind, labels, False)
                xla = program(variables, batch_images)
                changed = program(variables, jnp.nextafter(batch_images, jnp.inf))
                error, by_last_bit = difference(kernels, xla), difference(changed, xla)
                line = (
                    f"{name:17} {kind:9} {dtype:8} kernels against XLA {error:.1e}, "
                    f"XLA with the last bit changed {by_last_bit:.1e}"
                )
                tolerance = MODEL_TOLERANCE[dtype]
                if kind != "logits":
                    tolerance = max(tolerance, LAST_BITS * by_last_bit)
                if dtype == "float32":
                    exact = xla
                elif exact is not None:
                    by_dtype = difference(xla, exact)
                    tolerance = max(tolerance, by_dtype)
                    line += f", XLA against float32 {by_dtype:.1e}"
                good &= error <= tolerance
                verdict = "" if error <= tolerance else " ABOVE TOLERANCE"
                print(f"{line}{verdict}   ({time.monotonic() - start:.0f} s)", flush=True)
    return good


def require_kernels(parser: Parser) -> None:
    """End the program where the kernels cannot run."""
    if not dispatch.kernel_available():
        needs = f"they need an NVIDIA GPU and {dispatch.INSTALL}"
        parser.exit(1, f"error: no kernels to check: {needs}\n")


def main(arguments: list[str]) -> None:
    command = "python -m cotnet_jax.tools.check_kernels"
    parser = Parser(
        "Check the kernels on this machine's NVIDIA GPU.",
        [
            f"{command} shapes",
            f"{command} batch_norm --models=cotnet50",
            f"{command} large",
            f"{command} models --models=cotnet50,cotnext50_2x48d --batch_size=8",
        ],
        notes="Exits with 1 above a tolerance. The module's docstring says what each check means.",
    )
    every = list_models()
    parser.add_argument(
        "what",
        nargs="?",
        choices=["shapes", "batch_norm", "large", "models"],
        required=True,
        help="The aggregation against float64; batch normalisation against float64; more than "
        "2^31 values; whole models.",
    )
    parser.add_argument(
        "--models",
        type=by_comma(every),
        default=every,
        metavar="NAME,...",
        help="For shapes, batch_norm and models; default all.",
    )
    parser.add_argument(
        "--sizes",
        type=positives,
        default=[224, 320],
        metavar="N,...",
        help="Pixels of the images, for shapes and batch_norm; default 224,320.",
    )
    parser.add_argument(
        "--size", type=positive, default=224, metavar="N", help="Pixels of the images, for models."
    )
    parser.add_argument(
        "--batch_size", type=positive, default=32, metavar="N", help="Images; default %(default)s."
    )
    for name, known in (
        ("--dtypes", ["float32", "bfloat16"]),
        ("--passes", ["logits", "gradients", "smooth"]),
    ):
        parser.add_argument(
            name,
            type=by_comma(known),
            default=known,
            metavar="NAME,...",
            help=f"For models, of {', '.join(known)}; default all.",
        )
    options = parser.parse_args(arguments)
    require_kernels(parser)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    if options.what == "shapes":
        good = check_shapes(options.models, options.sizes)
    elif options.what == "batch_norm":
        good = batch_norm_checks.check_cases(options.models, options.sizes, IMAGES)
    elif options.what == "large":
        good = check_large()
    else:
        good = check_models(
            *(options.models, options.size, options.batch_size, options.dtypes, options.passes)
        )
    sys.exit(not good)


if __name__ == "__main__":
    main(sys.argv[1:])
