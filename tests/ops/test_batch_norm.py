"""Batch normalisation in training: the kernels in Triton's interpreter, and XLA's forms of them."""

import functools
import json
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import triton_interpreter  # noqa: F401  (first, or nothing interprets; may skip all)
from helpers.lowering import lower_alone
from helpers.processes import finish, start_python
from jax.sharding import PartitionSpec as P

from cotnet_jax.ops import dispatch, triton_call
from cotnet_jax.ops.batch_norm import (
    batch_norm,
    conv_batch_norm,
    conv_kernels_suit,
    covariance,
    covariance_batch_norm,
    covariance_suits,
)
from cotnet_jax.ops.batch_norm.triton import covariance_launch, launch

pytestmark = pytest.mark.kernels
TOLERANCE = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
# Activation, whether there is a residual, and whether samples of the branch are dropped.
ENDS = [
    (None, False, False),
    ("relu", False, False),
    ("silu", False, False),
    ("relu", True, False),
    ("relu", True, True),
]


@pytest.fixture(autouse=True)
def small_grids(monkeypatch):
    """Have few programs, of several blocks each, so that the interpreter is done soon."""
    monkeypatch.setattr(launch, "BLOCK", 256)
    monkeypatch.setattr(launch, "BLOCK_CHANNELS", 16)
    monkeypatch.setattr(launch, "PROGRAMS", 4)
    monkeypatch.setattr(launch, "PRODUCT", launch.PRODUCT._replace(rows=16, columns=16, programs=4))
    monkeypatch.setattr(covariance_launch, "PROGRAMS", 4)
    monkeypatch.setattr(covariance_launch, "LARGEST", 16)


@pytest.fixture
def as_beside_a_gpu(monkeypatch):
    """Have operations choose at lowering, as with an NVIDIA GPU beside the CPU."""
    monkeypatch.setattr(dispatch, "kernel_available", lambda: True)
    monkeypatch.setattr(dispatch, "SMALLEST", 0)


def operands(shape, dtype, channels_in=None):
    """x, gradient, residual, then scale, bias, branch scale and a kernel; of ``dtype`` rounded."""
    random = np.random.default_rng(0)
    channels = shape[-1]
    x_shape = (*shape[:-1], channels_in or channels)
    arrays = [random.standard_normal(x_shape) * 2 + 1]
    arrays += [random.standard_normal(shape) for _ in range(2)]
    arrays += [random.standard_normal((channels_in or 1, channels)) / np.sqrt(channels_in or 1)]
    vectors = [1 + random.random(channels), random.standard_normal(channels)]
    vectors += [(random.random(shape[0]) > 0.4) / 0.6]
    arrays = [np.asarray(jnp.asarray(a, dtype), np.float64) for a in arrays]
    return arrays, [np.asarray(np.float32(v), np.float64) for v in vectors]


def with_gradients(function, arrays, gradient):
    y, pullback = jax.vjp(function, *arrays)
    return [y, *pullback(gradient.astype(y.dtype))]


def results(shape, dtype, end, implementation):
    """The result, and gradients of x, scale, bias and residual."""
    activation, has_residual, drops = end
    (x, gradient, residual, _), vectors = operands(shape, dtype)
    if implementation == "float64":
        implementation, dtype, vector_dtype = "xla", jnp.float64, jnp.float64
    else:
        vector_dtype = jnp.float32
    scale, bias, branch_scale = (jnp.asarray(v, vector_dtype) for v in vectors)

    def call(x, scale, bias, residual):
        return batch_norm(
            *(x, scale, bias),
            activation=activation,
            residual=residual if has_residual else None,
            branch_scale=branch_scale if drops else None,
            implementation=implementation,
        )[0]

    arrays = (jnp.asarray(x, dtype), scale, bias, jnp.asarray(residual, dtype))
    return with_gradients(call, arrays, jnp.asarray(gradient, dtype))


def assert_close(got, expected, tolerance):
    for index, (array, wanted) in enumerate(zip(got, expected, strict=True)):
        array, wanted = np.asarray(array, np.float64), np.asarray(wanted, np.float64)
        error = np.linalg.norm(array - wanted) / max(np.linalg.norm(wanted), 1e-12)
        assert error <= tolerance, f"result {index}: {error}"


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 5, 7, 24), "float32"), ((2, 4, 4, 16), "bfloat16"), ((5, 3, 1, 40), "float16")],
)
def test_kernels_match_autodiff_in_float64(shape, dtype, end):
    with jax.enable_x64(True):
        expected = results(shape, dtype, end, "float64")
    assert_close(results(shape, dtype, end, "triton"), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("end", ENDS)
def test_platform_is_chosen_at_lowering(end, as_beside_a_gpu):
    shape = (3, 4, 5, 16)
    with jax.enable_x64(True):
        expected = results(shape, "float32", end, "float64")
    assert_close(results(shape, "float32", end, None), expected, TOLERANCE["float32"])


def conv_results(function, shape, channels_in, dtype, end, implementation, reuses_x):
    """The result, and gradients of x, kernel, scale, bias and residual.

    ``function`` is that of both operations, or None for one after the other in float64.
    """
    activation, has_residual, drops = end
    (x, gradient, residual, kernel), vectors = operands(shape, dtype, channels_in)
    if activation == "relu":
        y = x @ kernel
        z = (y - y.mean((0, 1, 2))) / y.std((0, 1, 2)) * vectors[0] + vectors[1]
        if has_residual:
            z = z * (vectors[2][:, None, None, None] if drops else 1) + residual
        # At the ReLU's kink rounding decides.
        gradient *= np.abs(z) > 0.02
    if function is None:
        dtype = vector_dtype = jnp.float64
    else:
        vector_dtype = jnp.float32
    scale, bias, branch_scale = (jnp.asarray(v, vector_dtype) for v in vectors)

    def call(x, kernel, scale, bias, residual):
        sums = {
            "residual": residual if has_residual else None,
            "branch_scale": branch_scale if drops else None,
        }
        if function is None:
            y, _, _ = batch_norm(x @ kernel, scale, bias, activation=activation, **sums)
        else:
            y, _, _, *reused = function(
                *(x, kernel, scale, bias),
                activation=activation,
                **({} if function is conv_batch_norm else sums),
                implementation=implementation,
                returns_x=reuses_x,
            )
            x = reused[0] if reuses_x else x
        return y + 0.5 * x.mean(-1, keepdims=True)

    arrays = [jnp.asarray(a, dtype) for a in (x, kernel)]
    arrays += [scale, bias, jnp.asarray(residual, dtype)]
    return with_gradients(call, arrays, jnp.asarray(gradient, dtype))


# Function and end; nothing is added to a ``conv_batch_norm``.
PRODUCTS = [(conv_batch_norm, end) for end in ENDS[:2]]
PRODUCTS += [(covariance_batch_norm, end) for end in ENDS if end[0] != "silu"]


@pytest.mark.parametrize(("function", "end"), PRODUCTS)
@pytest.mark.parametrize("reuses_x", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_product_kernels_match_autodiff_in_float64(function, end, reuses_x):
    # Neither rows nor channels fill the last block.
    channels_in, channels = (40, 24) if function is conv_batch_norm else (24, 40)
    case = ((2, 5, 5, channels), channels_in, "float16", end)
    with jax.enable_x64(True):
        expected = conv_results(None, *case, "xla", reuses_x)
    got = conv_results(function, *case, "triton", reuses_x)
    assert_close(got, expected, TOLERANCE["float16"])


@pytest.mark.parametrize(("function", "end"), PRODUCTS)
@pytest.mark.parametrize("reuses_x", [True, False])
def test_xla_forms_of_the_product_kernels(function, end, reuses_x, as_beside_a_gpu):
    case = ((2, 4, 5, 16), 24, "float32", end)
    with jax.enable_x64(True):
        expected = conv_results(None, *case, "xla", reuses_x)
    got = conv_results(function, *case, None, reuses_x)
    assert_close(got, expected, 5e-6)


@pytest.mark.parametrize("implementation", ["triton", None])
@pytest.mark.parametrize("reuses_x", [True, False])
def test_further_channels_of_the_input(implementation, reuses_x, as_beside_a_gpu):
    dtype = "float16" if implementation else "float32"
    (both, gradient, _, kernel), vectors = operands((3, 5, 4, 16), dtype, 40)

    def results(dtype, vector_dtype, apart):
        scale, bias = (jnp.asarray(v, vector_dtype) for v in vectors[:2])

        def call(x, more, kernel):
            if apart:
                options = {"implementation": implementation, "returns_x": reuses_x}
                y, _, _, *rest = conv_batch_norm(x, kernel, scale, bias, more=more, **options)
                return y + (rest[0] if reuses_x else x)[..., :16]
            y, _, _ = batch_norm(jnp.concatenate([x, more], -1) @ kernel, scale, bias)
            return y + x[..., :16]

        arrays = [jnp.asarray(a, dtype) for a in (both[..., :24], both[..., 24:], kernel)]
        return with_gradients(call, arrays, jnp.asarray(gradient, dtype))

    with jax.enable_x64(True):
        expected = results(jnp.float64, jnp.float64, apart=False)
    assert_close(results(dtype, jnp.float32, apart=True), expected, 3 * TOLERANCE[dtype])


def test_many_channels_in_have_the_form_of_xla(monkeypatch):
    (x, gradient, _, kernel), (scale, bias, _) = operands((1, 2, 2, 264), "float16", 264)

    def results(implementation):
        def call(x, kernel):
            options = {"activation": "relu", "implementation": implementation}
            return covariance_batch_norm(x, kernel, scale, bias, **options)[0]

        arrays = [jnp.asarray(x, jnp.float16), jnp.asarray(kernel, jnp.float32)]
        return with_gradients(call, arrays, jnp.asarray(gradient))

    expected = results("xla")
    monkeypatch.setattr(covariance, "LAUNCH", "no.module")
    for array, wanted in zip(results("triton"), expected, strict=True):
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_a_branch_scale_without_a_residual_is_ignored(implementation):
    (x, gradient, _, kernel), (scale, bias, branch_scale) = operands((3, 2, 3, 24), "float16", 16)
    options = {"activation": "relu", "implementation": implementation}

    def results(**scales):
        def call(x, kernel):
            return covariance_batch_norm(x, kernel, scale, bias, **options, **scales)[0]

        arrays = [jnp.asarray(x, jnp.float16), jnp.asarray(kernel, jnp.float32)]
        return with_gradients(call, arrays, jnp.asarray(gradient))

    for array, wanted in zip(
        results(branch_scale=jnp.asarray(branch_scale, jnp.float32)), results(), strict=True
    ):
        np.testing.assert_array_equal(array, wanted)


def test_statistics_of_several_devices_are_those_of_the_whole_batch():
    """In float64, with all gradients, by the products' own statistics and by the covariance."""
    code = """
    import functools, json
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec as P
    from cotnet_jax.ops.batch_norm import batch_norm, conv_batch_norm, covariance_batch_norm

    jax.config.update("jax_enable_x64", True)
    random = np.random.default_rng(0)
    # A product of x and of more; what is added to one of x is ``more``, too.
    x, more = (jnp.asarray(random.standard_normal((8, 2, 3, 4)) + 1) for _ in range(2))
    kernel, wide = (jnp.asarray(random.standard_normal((k, 4))) for k in (4, 8))
    scale, bias = (jnp.asarray(random.random(4) + 0.5) for _ in range(2))
    drops = jnp.asarray([0.0, 2.0] * 4)

    def whole(x, more, kernel, scale, bias, drops):
        if len(kernel) == 4:
            return batch_norm(x @ kernel, scale, bias, activation="relu", residual=more,
                              branch_scale=drops) + (x,)
        return batch_norm(jnp.concatenate([x, more], -1) @ kernel, scale, bias) + (x,)

    def parts(x, more, kernel, scale, bias, drops):
        rest = {"axis_name": "data", "returns_x": True}
        if len(kernel) == 4:
            return covariance_batch_norm(x, kernel, scale, bias, activation="relu", residual=more,
                                         branch_scale=drops, **rest)
        return conv_batch_norm(x, kernel, scale, bias, more=more, **rest)

    def run(function, *operands):
        def loss(*operands):
            y, mean, var, x = function(*operands, drops_)
            return jnp.sum(y**3) + jnp.sum(y * x), (mean, var)
        *operands, drops_ = operands
        return jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True)(*operands)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, same = P("data"), P()
    on_devices = jax.jit(jax.shard_map(
        functools.partial(run, parts), mesh=mesh, in_specs=(data, data, same, same, same, data),
        out_specs=((data, data, same, same, same), (data, data)),
    ))

    def difference(a, b):
        # Every device has the statistics.
        b = np.tile(b, len(a) // len(b)) if b.ndim == 1 else b
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    errors = []
    for w in (kernel, wide):
        operands = (x, more, w, scale, bias, drops)
        several, one = on_devices(*operands), run(whole, *operands)
        errors += map(difference, jax.tree.leaves(several), jax.tree.leaves(one))
    print(json.dumps(errors))
    """
    (output,) = finish(start_python(textwrap.dedent(code), devices=4), timeout=300)
    errors = json.loads(output.splitlines()[-1])
    assert len(errors) == 14
    assert max(errors) < 1e-12, errors


@pytest.mark.parametrize("transformation", ["vmap", "shard_map", "remat"])
def test_transformations_give_what_xla_gives(transformation):
    (x, _, residual, kernel), (scale, bias, _) = operands((4, 3, 3, 16), "float16", 16)
    arrays = [jnp.asarray(a, jnp.float16) for a in (x, residual)]
    shared = [jnp.asarray(a, jnp.float32) for a in (kernel, scale, bias)]

    def loss(x, residual, kernel, scale, bias, implementation):
        rest = {"activation": "relu", "implementation": implementation}
        short = kernel.astype(x.dtype)
        if implementation == "triton":
            y, _, _ = covariance_batch_norm(x, kernel, scale, bias, residual=residual, **rest)
            y, _, _ = conv_batch_norm(y, kernel, scale, bias, **rest)
        else:
            y, _, _ = batch_norm(x @ short, scale, bias, residual=residual, **rest)
            y, _, _ = batch_norm(y @ short, scale, bias, **rest)
        y, _, _ = batch_norm(y, scale, bias, activation="silu", implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    def gradients(implementation):
        function = functools.partial(loss, implementation=implementation)
        if transformation == "remat":
            function = jax.checkpoint(function)
        gradient = jax.grad(function, argnums=(0, 1, 2, 3, 4))
        if transformation == "vmap":
            pairs = [a.reshape(2, 2, *a.shape[1:]) for a in arrays]
            return jax.vmap(gradient, in_axes=(0, 0, None, None, None))(*pairs, *shared)
        if transformation == "shard_map":
            mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            specs = (P("data"), P("data"), P(), P(), P())
            mapped = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs)
            gradient = jax.jit(mapped)
        return gradient(*arrays, *shared)

    assert_close(gradients("triton"), gradients("xla"), 2e-2)


def test_statistics_have_no_gradient_and_are_those_of_the_batch():
    (x, *_), (scale, bias, _) = operands((3, 4, 5, 16), "float32")
    x = jnp.asarray(x, jnp.float32)
    _, mean, var = batch_norm(x, jnp.asarray(scale), jnp.asarray(bias), implementation="triton")
    np.testing.assert_allclose(mean, np.mean(x, (0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(var, np.var(x, (0, 1, 2)), rtol=1e-5)
    gradient = jax.grad(lambda x: batch_norm(x, scale, bias, implementation="triton")[2].sum())(x)
    assert not np.any(gradient)


def test_kernels_are_for_short_floats_and_small_kernels():
    x = jnp.zeros((2, 4, 4, 64), jnp.bfloat16)
    suits = functools.partial(conv_kernels_suit, "triton")
    assert suits(x, 64, jnp.bfloat16, "relu")
    assert not suits(x, 72, jnp.bfloat16, "relu")
    assert not suits(x, 64, jnp.bfloat16, "silu")
    assert not suits(x, 60, jnp.bfloat16, None)
    assert not suits(x.astype(jnp.float32), 64, jnp.float32, None)
    assert not conv_kernels_suit("xla", x, 64, jnp.bfloat16, None)
    assert suits(x, 64, jnp.bfloat16, None, more=x)
    assert not suits(x, 256, jnp.bfloat16, None, more=x)
    assert covariance_suits("triton", x, 2048, jnp.bfloat16, "relu")
    assert covariance_suits("triton", x, 64, jnp.float16, None)
    assert not covariance_suits("triton", x, 32, jnp.bfloat16, "relu")
    assert not covariance_suits("triton", x, 64, jnp.bfloat16, "silu")
    assert not covariance_suits("triton", x, 76, jnp.bfloat16, None)
    assert not covariance_suits("triton", x, 256, jnp.float32, None)
    assert not covariance_suits("triton", x, 256, jnp.float64, None)
    assert not conv_kernels_suit("triton", x, 64, jnp.float64, None)
    assert not covariance_suits("xla", x, 256, jnp.bfloat16, None)


@pytest.mark.parametrize(("capability", "stages"), [("8.9", 2), ("9.0", 3)])
def test_less_is_loaded_ahead_into_a_small_shared_memory(capability, stages, monkeypatch):
    gpu = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [gpu])
    assert triton_call.most_stages.__wrapped__() == stages


LOWERING = """
import sys, types
# Only its name is needed: nothing is called.
sys.modules["jax_triton"] = types.ModuleType("jax_triton")
sys.modules["jax_triton"].triton_call = lambda out_type: None
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cotnet_jax.ops.batch_norm.triton import covariance_kernels, covariance_launch
from cotnet_jax.ops.batch_norm.triton import launch, product_kernels, sums_kernels

SHORT = ("gradient", "x", "y", "output", "kernel", "other", "x_gradient", "masked", "residual")
SHORT += ("g", "transposed", "square", "more", "more_gradient")
# Of compute capability 8 are consumers' GPUs, too; they have the least memory.
GPUS = {"8.0": [(80, 99 * 1024, 2)], "9.0": [(90, 227 * 1024, 3)]}
sums = {"C": 72, "SLOTS": 8, "BLOCK_ROWS": 128, "BLOCK_C": 64, "PIXELS": 49, "SCALED": True}
sums |= {"ROWS": 5000, "ACTIVATION": "silu", "OTHER": True, "MORE": 0}
product = sums | {"ACTIVATION": "relu"}
wide = product | {"K": 256, "N": 1024, "RELU": True, "RESIDUAL": True}
for kernel, constants, config in (
    (sums_kernels.channel_sums, sums, None),
    (sums_kernels.backward_sums, sums, None),
    (sums_kernels.residual_backward_sums, sums, None),
    (product_kernels.forward, product | {"K": 256, "N": 64}, launch.PRODUCT),
    (product_kernels.backward, product | {"K": 256, "N": 64}, launch.PRODUCT),
    (product_kernels.backward, product | {"K": 128, "MORE": 128, "N": 64}, launch.PRODUCT),
    (covariance_kernels.moments, wide, covariance_launch.moments_config(256)),
    (covariance_kernels.affine, wide, covariance_launch.affine_config(256, 1024)),
    (
        covariance_kernels.gradient_products,
        wide,
        covariance_launch.gradient_products_config(256, 1024),
    ),
    (covariance_kernels.input_gradient, wide, covariance_launch.input_gradient_config(256)),
):
    for capability, memory, stages in GPUS[sys.argv[1]]:
        constants["CONFIG"] = config and config._replace(num_stages=min(config.num_stages, stages))
        signature = {
            name: ("*bf16" if name[:-4] in SHORT else "*fp32")
            if name.endswith("_ptr")
            else "constexpr"
            for name in kernel.arg_names
        }
        given = {name: constants[name] for name in kernel.arg_names if name in constants}
        pointers = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
        # As jax-triton says of arrays; without it nothing is loaded ahead.
        aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
        built = compile(
            ASTSource(kernel, signature, given, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": config.num_warps if config else 4},
        )
        assert f".target sm_{capability}" in built.asm["ptx"], built.asm["ptx"][:500]
        assert built.metadata.shared <= memory, (kernel, built.metadata.shared)
        print(kernel.fn.__name__, capability)
"""


@pytest.mark.parametrize("capability", ["9.0", pytest.param("8.0", marks=pytest.mark.slow)])
def test_kernels_lower_to_ptx_and_fit_into_shared_memory(tmp_path, capability):
    assert len(lower_alone(LOWERING, tmp_path, capability)) == 10
