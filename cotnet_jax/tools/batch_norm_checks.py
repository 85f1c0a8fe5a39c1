"""What ``check_kernels`` asks of batch normalisation's kernels."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from cotnet_jax.layers import batch_norm as layer
from cotnet_jax.models.cotnet import create_model
from cotnet_jax.ops.batch_norm import batch_norm, conv_batch_norm, covariance_batch_norm
from cotnet_jax.tools.benchmark_ops import on_poisoned_memory

TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}
# A ReLU's gradient is not compared so near to its kink, relative to the standard deviation: there
# rounding decides whether there is one.
KINK = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True, order=True)
class Case:
    """A batch normalisation of a model in training.

    Attributes:
      height, width, channels: of the normalised array.
      channels_in: of the input of a 1x1 convolution that a kernel does as well; 0 for none.
      activation: "relu", "silu" or "none".
      residual, drops: whether a residual is added, and samples of the branch are dropped.
      reuses_x: whether more is computed from the convolution's input.
      by_covariance: whether the statistics come from the covariance of that input.
      more: further channels of the input, in an array of their own.
    """

    height: int
    width: int
    channels: int
    channels_in: int = 0
    activation: str = "none"
    residual: bool = False
    drops: bool = False
    reuses_x: bool = False
    by_covariance: bool = False
    more: int = 0

    def __str__(self):
        more = f" + {self.more}" if self.more else ""
        convolution = f"{self.channels_in}{more} -> " if self.channels_in else ""
        words = ("residual", "drops", "reuses_x", "by_covariance")
        words = [word for word in words if getattr(self, word)]
        size = f"{self.height}x{self.width}"
        return f"{size} {convolution}{self.channels} {' '.join([self.activation, *words])}"


def find_cases(name: str, size: int, dtype) -> set[Case]:
    """Return the cases of a model for square images of ``size`` pixels, as they train."""
    cases = set()

    def record(name: str, function: Callable) -> Callable:
        def call(x, *operands, activation=None, residual=None, branch_scale=None, **options):
            kernel = None if name == "batch_norm" else operands[0]
            more = options.get("more")
            case = Case(
                height=x.shape[1],
                width=x.shape[2],
                channels=(x if kernel is None else kernel).shape[-1],
                channels_in=0 if kernel is None else x.shape[-1],
                activation=activation or "none",
                residual=residual is not None,
                drops=branch_scale is not None,
                reuses_x=options.get("returns_x", False),
                by_covariance=name == "covariance_batch_norm",
                more=0 if more is None else more.shape[-1],
            )
            if x.shape[1] > 1:
                cases.add(case)
            after = {"residual": residual, "branch_scale": branch_scale}
            after = {name: array for name, array in after.items() if array is not None}
            return function(x, *operands, activation=activation, **after, **options)

        return call

    # So many images that the kernels run at every size.
    images = jax.ShapeDtypeStruct((640, size, size, 3), dtype)
    model = create_model(name, dtype=dtype, drop_path_rate=0.1)
    init = functools.partial(model.init, train=True, mutable=True)
    with contextlib.ExitStack() as stack:
        for function in (batch_norm, conv_batch_norm, covariance_batch_norm):
            recording = record(function.__name__, function)
            stack.enter_context(mock.patch.object(layer, function.__name__, recording))
        jax.eval_shape(init, {"params": jax.random.key(0), "dropout": jax.random.key(0)}, images)
    return cases


def make_operands(case: Case, images: int, dtype: str) -> list[np.ndarray]:
    """Return x, kernel, residual, scale, bias, branch scale and the result's gradient, float64.

    Their values are those of ``dtype``, those of the vectors float32.
    """
    random = np.random.default_rng(0)
    result = (images, case.height, case.width, case.channels)
    x = (*result[:3], (case.channels_in or case.channels) + case.more)
    kernel = random.standard_normal((x[-1], case.channels)) / np.sqrt(x[-1])
    arrays = [random.standard_normal(x) + 0.5, kernel, random.standard_normal(result)]
    vectors = [1 + random.random(case.channels), random.standard_normal(case.channels)]
    vectors += [(random.random(images) > 0.3) / 0.7]
    arrays = [*arrays, random.standard_normal(result)]
    *arrays, gradient = (np.asarray(a.astype(jnp.dtype(dtype)), np.float64) for a in arrays)
    return [*arrays, *(np.asarray(v.astype(np.float32), np.float64) for v in vectors), gradient]


def make_function(case: Case, implementation: str) -> Callable:
    """Return a function of ``make_operands``: the result and the gradients of the first five."""
    fused = case.channels_in and implementation == "triton"

    def both(x, kernel, residual, scale, bias, branch_scale, gradient):
        def forward(x, kernel, residual, scale, bias):
            options: dict[str, Any] = {
                "activation": None if case.activation == "none" else case.activation,
                "residual": residual if case.residual else None,
                "branch_scale": branch_scale if case.drops else None,
                "implementation": implementation,
            }
            again = x
            if fused:
                function = covariance_batch_norm if case.by_covariance else conv_batch_norm
                if not case.by_covariance:
                    del options["residual"], options["branch_scale"]
                if case.more:
                    x, options["more"] = jnp.split(x, [case.channels_in], axis=-1)
                y, _, _, *rest = function(
                    x, kernel, scale, bias, returns_x=case.reuses_x, **options
                )
                if case.reuses_x:
                    again = jnp.concatenate([*rest, *([options["more"]] if case.more else [])], -1)
            else:
                normalized = x @ kernel if case.channels_in else x
                y, _, _ = batch_norm(normalized, scale, bias, **options)
            return (y, again) if case.reuses_x else (y,)

        results, pullback = jax.vjp(forward, x, kernel, residual, scale, bias)
        x_gradient, kernel_gradient, residual_gradient, *vectors = pullback(
            (gradient, x)[: len(results)]
        )
        gradients = [x_gradient, *vectors]
        gradients += [kernel_gradient] if case.channels_in else []
        gradients += [residual_gradient] if case.residual else []
        return (results[0], *gradients)

    return both


def errors_of(case: Case, images: int, dtype: str) -> tuple[list[float], str]:
    """Return relative L2 errors of the result and the gradients, and how many lay on NaN."""
    operands = make_operands(case, images, dtype)
    x, kernel, residual, scale, bias, branch_scale, gradient = operands
    if case.activation == "relu":
        y = x @ kernel if case.channels_in else x
        z = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5) * scale + bias
        if case.residual:
            z = z * (branch_scale[:, None, None, None] if case.drops else 1) + residual
        gradient *= np.abs(z) > KINK[dtype]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = jax.jit(make_function(case, "xla"))(*map(jnp.asarray, operands))
        exact = [np.asarray(array) for array in exact]
    short = [jnp.asarray(a, dtype if a.ndim in (2, 4) else np.float32) for a in operands]
    results, poisoned = on_poisoned_memory(make_function(case, "triton"), short)
    errors = [
        float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
        for a, b in zip(results, exact, strict=True)
    ]
    return errors, f"{poisoned} of {len(results)}"


def check_cases(names: list[str], sizes: list[int], images: int) -> bool:
    """Print the errors of all cases; return whether all are within tolerance."""
    worst = dict.fromkeys(TOLERANCE, 0.0)
    print("errors of: result, then gradients of x, scale, bias, and of kernel and residual if any")
    for dtype in worst:
        cases = set().union(*(find_cases(n, s, jnp.dtype(dtype)) for n in names for s in sizes))
        for case in sorted(cases):
            errors, poisoned = errors_of(case, images, dtype)
            worst[dtype] = max(worst[dtype], *errors, key=lambda e: (np.isnan(e), e))
            text = " ".join(f"{error:.1e}" for error in errors)
            print(f"{case!s:40} {dtype:9} {text}   on NaN: {poisoned}", flush=True)
        print(f"{dtype}: {len(cases)} cases, largest error {worst[dtype]:.2e}", flush=True)
    return all(error <= TOLERANCE[dtype] for dtype, error in worst.items())


def large_errors() -> Iterator[tuple[str, float]]:
    """Yield, for each kernel, its error where its arrays have more than 2^31 values.

    The batch is one of a few images, repeated: sums are so many times its own, and the last images'
    results are those of the few.
    """
    # It needs JAX with CUDA.
    from cotnet_jax.ops.batch_norm.triton import covariance_launch, launch

    size, channels_in, channels, few = 56, 64, 256, 4
    repeats = 2**31 // (few * size * size * channels) + 1
    random = np.random.default_rng(0)
    shape = (few, size, size)
    x, other = (random.standard_normal((*shape, channels_in), np.float32) for _ in range(2))
    y, gradient, output = (random.standard_normal((*shape, channels), np.float32) for _ in range(3))
    kernel = random.standard_normal((channels_in, channels), np.float32) / 8
    vectors = [jnp.asarray(random.standard_normal(channels), jnp.float32) for _ in range(5)]
    short = functools.partial(jnp.asarray, dtype=jnp.bfloat16)

    backward = functools.partial(launch.product_backward, activation="relu", added=True, more=False)
    affine = functools.partial(
        covariance_launch.affine, activation="relu", has_residual=True, scaled=False
    )
    square = random.standard_normal((channels_in, channels_in), np.float32) / 8
    for name, function, arrays, shared in (
        ("channel_sums", launch.channel_sums, (y,), ()),
        (
            "backward_sums",
            functools.partial(launch.backward_sums, activation="silu"),
            (gradient, y),
            vectors[:3],
        ),
        (
            "residual_backward_sums",
            launch.residual_backward_sums,
            (gradient, y, output),
            vectors[:1],
        ),
        ("product", launch.product, (y,), (short(kernel.T),)),
        (
            "product_backward",
            lambda g, y, x, other, kernel, *vectors: backward(g, y, x, kernel, *vectors, other),
            (x, other, gradient, y),
            (short(kernel.T), *(vector[:channels_in] for vector in vectors)),
        ),
        ("moments", covariance_launch.moments, (y,), ()),
        (
            "affine",
            lambda x, residual, kernel, shift: affine(x, kernel, shift, residual),
            (x, y),
            (short(kernel), vectors[0]),
        ),
        (
            "gradient_products",
            functools.partial(covariance_launch.gradient_products, masked=True, scaled=False),
            (gradient, x, output),
            (),
        ),
        (
            "input_gradient",
            functools.partial(covariance_launch.input_gradient, scaled=False, added=False),
            (gradient, x),
            (short(kernel), short(square), vectors[0][:channels_in]),
        ),
    ):
        program = jax.jit(function)
        expected = jax.tree.leaves(program(*map(short, arrays), *shared))
        many = (jnp.tile(short(a), (repeats, 1, 1, 1)) for a in arrays)
        results = jax.tree.leaves(program(*many, *shared))
        for result, wanted in zip(results, expected, strict=True):
            wanted = np.asarray(wanted, np.float64)
            if result.ndim == wanted.ndim == 4:
                result = result[-few:]
            else:
                wanted *= repeats
            got = np.asarray(result, np.float64)
            yield name, float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
