"""The aggregation's GPU kernels without a GPU: in Triton's interpreter, and down to PTX."""

import functools
import json
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import triton_interpreter  # noqa: F401  (first, or nothing interprets; may skip all)
from helpers.lowering import ROOT, lower_alone
from jax.sharding import PartitionSpec as P

from cotnet_jax.ops import dispatch
from cotnet_jax.ops.local_aggregation import (
    local_aggregation,
    normalized_local_aggregation,
    reference,
)
from cotnet_jax.ops.local_aggregation.shapes import AggregationShape
from cotnet_jax.ops.local_aggregation.triton import configs, launch, tuned_configs
from cotnet_jax.ops.local_aggregation.triton.configs import (
    AggregationConfig,
    CooperativeConfig,
    NormalizationConfig,
    smallest_block,
)
from cotnet_jax.tools import sanitize_kernels

pytestmark = pytest.mark.kernels
# N, H, W, groups, share, weight channels, kernel size; parts, rows, block, prefetch.
CASES = [
    ((2, 5, 7, 1, 8, 8, 3), (1, 2, 512, False)),
    ((2, 5, 7, 1, 8, 8, 3), (2, 5, 1024, True)),
    ((1, 4, 3, 2, 8, 6, 3), (1, 3, 256, True)),
    ((1, 2, 4, 2, 3, 5, 1), (1, 2, 64, False)),
    ((1, 3, 2, 1, 2, 4, 5), (1, 2, 32, False)),
    ((2, 1, 1, 1, 4, 2, 3), (4, 1, 64, False)),
]
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}


H100 = tuned_configs.Gpu("NVIDIA H100 80GB HBM3", "9.0", 132)


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    """Have the configurations of an H100 chosen, without one."""
    monkeypatch.setattr(launch, "gpu", lambda: H100)


@pytest.fixture
def use_config(monkeypatch):
    """Give all aggregation kernels one configuration, with larger blocks than suit a GPU but fewer
    of them, and turn the cooperative kernels off."""

    def use(parts, rows, block, prefetch):
        def choose(table, kernel, itemsize, shape):
            rows_here = min(rows, shape.h)
            return AggregationConfig(parts, rows_here, block, 4, prefetch, reload=not prefetch)

        monkeypatch.setattr(configs, "choose_config", choose)
        monkeypatch.setenv("COTNET_JAX_COOPERATIVE_KERNELS", "0")

    return use


def inputs(shape, seed=0):
    """Float64 values, weights, gradient, scale, bias, output scale and shift."""
    n, h, w, groups, share, channels, size = shape
    random = np.random.default_rng(seed)
    width = groups * share * channels
    taps = (groups, size**2, channels)
    shapes = [(n, h, w, width), (n, h, w, *taps), (n, h, w, width), taps, taps, (width,), (width,)]
    return [random.standard_normal(s) + (len(s) == 6) for s in shapes]


def with_gradients(function, operands, gradient):
    value, pullback = jax.vjp(function, *operands)
    return [value, *pullback(gradient.astype(value.dtype))]


def assert_close(arrays, expected, tolerance):
    for index, (array, wanted) in enumerate(zip(arrays, expected, strict=True)):
        array, wanted = np.asarray(array, np.float64), np.asarray(wanted, np.float64)
        error = np.linalg.norm(array - wanted) / np.linalg.norm(wanted)
        assert error <= tolerance, f"result {index}: {error}"


@pytest.mark.parametrize(("shape", "config"), CASES)
def test_kernels_match_plain_loops(shape, config, use_config):
    use_config(*config)
    values, weights, gradient = inputs(shape)[:3]
    call = functools.partial(local_aggregation, implementation="triton")
    arrays = [jnp.asarray(a, jnp.float32) for a in (values, weights)]
    got = with_gradients(call, arrays, jnp.asarray(gradient))
    assert_close(got, reference.loops(values, weights, gradient), TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_take_short_floats(dtype, use_config):
    use_config(1, 4, 256, True)
    arrays = [jnp.asarray(a, dtype) for a in inputs((1, 4, 3, 1, 8, 8, 3))[:3]]
    call = functools.partial(local_aggregation, implementation="triton")
    got = with_gradients(call, arrays[:2], arrays[2])
    assert all(a.dtype == dtype for a in got)
    # The interpreter cuts off, where a GPU rounds to nearest.
    assert_close(
        got, reference.loops(*(np.asarray(a, np.float64) for a in arrays)), TOLERANCE[dtype]
    )


def check_normalized(shape, implementation, activated, dtype="float32"):
    """Compare the normalised aggregation and its gradients with the float64 reference."""
    values, raw, gradient, *parameters = inputs(shape)
    values, raw, gradient = (
        np.asarray(jnp.asarray(a, dtype), np.float64) for a in (values, raw, gradient)
    )
    parameters = parameters[: 4 if activated else 2]
    expected = reference.normalized_local_aggregation(values, raw, gradient, *parameters)

    def call(values, raw, scale, bias, output_scale=None, output_shift=None):
        return normalized_local_aggregation(
            *(values, raw, scale, bias),
            output_scale=output_scale,
            output_shift=output_shift,
            implementation=implementation,
        )

    arrays = [jnp.asarray(a, dtype) for a in (values, raw)]
    arrays += [jnp.asarray(a, jnp.float32) for a in parameters]
    got = with_gradients(call, arrays, jnp.asarray(gradient))
    # The gradient of short weights is rounded before and after their normalisation's.
    assert_close(got, expected, TOLERANCE[dtype] * (1 if dtype == "float32" else 1.5))


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize(("shape", "config"), CASES[1:4])
def test_normalized_aggregation_matches_its_composition(
    shape, config, implementation, activated, use_config
):
    use_config(*config)
    check_normalized(shape, implementation, activated)


# Shape as in CASES; slice, rows, lanes, prefetch; programs on the whole GPU.
COOPERATIVE = [
    ((1, 5, 7, 1, 8, 8, 3), (8, 3, 32, False), 9),
    ((3, 3, 3, 2, 2, 6, 3), (12, 3, 32, True), 4),
    ((2, 3, 1, 1, 1, 3, 3), (3, 2, 2, False), 0),
    ((1, 3, 4, 2, 2, 3, 5), (6, 2, 16, True), 99),
    # Cooperative groups of two programs and of one.
    ((2, 4, 3, 2, 1, 4, 3), (2, 2, 8, False), 99),
    ((3, 3, 4, 2, 1, 4, 3), (4, 3, 16, True), 2),
]


# Each dtype takes one of the two variants, to save time.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "bfloat16") for case in COOPERATIVE[::2]),
        *((case, "float16") for case in COOPERATIVE[1::2]),
    ],
)
def test_normalized_aggregation_by_cooperative_kernels(case, dtype, monkeypatch):
    shape, config, programs = case
    activated = dtype == "float16"
    *sizes, prefetch = config
    config = CooperativeConfig(*sizes, 1, prefetch, resident=programs)
    monkeypatch.setattr(launch, "cooperative_config", lambda *_: config)
    monkeypatch.setattr(launch, "gpu", lambda: H100._replace(multiprocessors=1))
    check_normalized(shape, "triton", activated, dtype)


# The kernels, and the options of those that have some.
KERNELS = {
    "forward": [
        {"NORMALIZE": normalize, "ACTIVATE": activate}
        for normalize, activate in ((False, False), (True, False), (True, True))
    ],
    "backward": [{"NORMALIZE": False}, {"NORMALIZE": True}],
    "statistics": [{}],
    "group_norm_backward": [{}],
    "cooperative_forward": [{"ACTIVATE": False}, {"ACTIVATE": True}],
    "cooperative_backward": [{}],
}


def note_calls(monkeypatch):
    """Return a list that each call of a kernel adds its name and constants to."""
    called = []
    call = launch.call_kernel

    def note(kernel, *arguments, **constants):
        called.append((kernel.fn.__name__, constants))
        return call(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "call_kernel", note)
    return called


def test_the_memory_check_runs_every_kernel(monkeypatch):
    """Which ones tracing tells; other tests run them."""
    called = note_calls(monkeypatch)
    monkeypatch.setattr(sanitize_kernels, "run", jax.eval_shape)
    sanitize_kernels.run_aggregation_kernels()
    assert {name for name, _ in called} == set(KERNELS)
    for kernel, variants in KERNELS.items():
        some = [constants for name, constants in called if name == kernel]
        assert all(any(options.items() <= c.items() for c in some) for options in variants)
    activated = [c for name, c in called if name == "forward" and c["ACTIVATE"]]
    assert {constants["CONFIG"].reload for constants in activated} == {False, True}


@pytest.mark.parametrize(("switch", "cooperative"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_turns_only_the_cooperative_kernels_off(switch, cooperative, monkeypatch):
    if switch is None:
        monkeypatch.delenv("COTNET_JAX_COOPERATIVE_KERNELS", raising=False)
    else:
        monkeypatch.setenv("COTNET_JAX_COOPERATIVE_KERNELS", switch)
    called = note_calls(monkeypatch)
    shape = AggregationShape(7, 7, 1, 8, 64)
    values = jax.ShapeDtypeStruct((1, 7, 7, shape.pixel_values), "bfloat16")
    weights = jax.ShapeDtypeStruct((1, 7, 7, 1, 9, 64), "bfloat16")
    taps = jax.ShapeDtypeStruct((1, 9, 64), "float32")
    call = functools.partial(normalized_local_aggregation, implementation="triton")
    jax.eval_shape(functools.partial(with_gradients, call), (values, weights, taps, taps), values)
    expected = ["statistics", "forward", "backward", "group_norm_backward"]
    if cooperative:
        expected = ["cooperative_forward", "cooperative_backward"]
    assert [name for name, _ in called] == expected


def test_another_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv("COTNET_JAX_COOPERATIVE_KERNELS", "off")
    values, weights, taps = (jnp.ones(s) for s in ((1, 2, 2, 8), (1, 2, 2, 1, 9, 1), (1, 9, 1)))
    with pytest.raises(ValueError, match="COTNET_JAX_COOPERATIVE_KERNELS='off': set it to 0"):
        normalized_local_aggregation(values, weights, taps, taps, implementation="triton")


# More images than programs, and fewer.
@pytest.mark.parametrize(
    ("programs", "groups", "channels"), [(2, 1, 4), (9, 1, 3), (9, 2, 4), (2, 2, 3)]
)
def test_normalization_in_many_blocks(programs, groups, channels, use_config, monkeypatch):
    use_config(1, 4, 256, False)
    monkeypatch.setattr(launch, "PROGRAMS", programs)

    def choose(table, kernel, itemsize, shape):
        block = smallest_block(kernel, shape.groups, shape.channels, shape.taps)
        return NormalizationConfig(block, 4, 3)

    monkeypatch.setattr(configs, "choose_normalization_config", choose)
    operands = inputs((3, 4, 5, groups, 2, channels, 3))
    operands = [jnp.asarray(operands[i], jnp.float32) for i in (0, 1, 3, 4, 2)]
    got, expected = (
        with_gradients(
            functools.partial(normalized_local_aggregation, implementation=implementation),
            operands[:4],
            operands[4],
        )
        for implementation in ("triton", "xla")
    )
    assert_close(got, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("mean", [0, 30])
def test_statistics_are_near_the_exact_ones(mean, use_config):
    """An error in them is one of all of an image's weights, which networks amplify."""
    use_config(1, 4, 256, False)
    raw = np.random.default_rng(0).standard_normal((2, 14, 14, 1, 9, 8)) + mean
    raw = raw.astype(np.float32)
    got = launch.statistics(jnp.asarray(raw), 1e-5)
    got_mean, got_rstd = (np.asarray(a, np.float64)[:, :, 0] for a in got)
    axes, exact = (1, 2, 4), raw.astype(np.float64)
    deviation = np.sqrt(exact.var(axes) + 1e-5)
    assert np.sqrt(np.mean((got_rstd * deviation - 1) ** 2)) < 1.5e-7
    error = np.sqrt(np.mean(((got_mean - exact.mean(axes)) / deviation) ** 2))
    # What float32 leaves of a mean, and of sums of deviations.
    assert error < mean * 2**-24 + 8e-8


def losses(values, raw, scale, bias, implementation):
    """A scalar that depends on both operations."""
    y = normalized_local_aggregation(values, raw, scale, bias, implementation=implementation)
    return jnp.sum(jnp.square(local_aggregation(y, raw, implementation=implementation)))


def transformed(name, function):
    """``function`` of four arrays under a transformation, as a function of the same arrays."""
    gradient = jax.grad(function, (0, 1, 2, 3))
    if name == "jit":
        return jax.jit(gradient)
    if name == "remat":
        return jax.jit(jax.grad(jax.checkpoint(function), (0, 1, 2, 3)))
    if name == "vmap":
        return lambda *a: jax.vmap(gradient, (0, 0, None, None))(
            *(jnp.stack([b, 2 * b]) for b in a[:2]), *a[2:]
        )
    if name == "vmap parameters":
        return lambda *a: jax.vmap(gradient, (None, None, 0, 0))(
            *a[:2], *(jnp.stack([b, 2 * b]) for b in a[2:])
        )
    if name == "vmap of jit, one operand":
        return lambda *a: jax.vmap(jax.jit(gradient), (0, None, None, None))(
            jnp.stack([a[0], 2 * a[0]]), *a[1:]
        )
    if name == "scan":

        def body(carry, _):
            return jax.tree.map(lambda a, b: a + 1e-3 * b, carry, gradient(*carry)), None

        return jax.jit(lambda *a: jax.lax.scan(body, a, length=2)[0])
    assert name == "shard_map"
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(*operands):
        return jax.lax.psum(function(*operands), "data")

    return jax.jit(
        jax.shard_map(
            jax.grad(total, (0, 1, 2, 3)),
            mesh=mesh,
            in_specs=(P("data"), P("data"), P(), P()),
            out_specs=(P("data"), P("data"), P(), P()),
        )
    )


@functools.cache
def transformed_gradients(name, implementation):
    operands = inputs((2, 2, 2, 2, 2, 3, 3))
    operands = [jnp.asarray(operands[i], jnp.float32) for i in (0, 1, 3, 4)]
    return transformed(name, functools.partial(losses, implementation=implementation))(*operands)


@pytest.mark.parametrize(
    "name",
    [
        *("jit", "remat", "vmap", "vmap parameters", "vmap of jit, one operand"),
        *("scan", "shard_map"),
    ],
)
def test_transformations_give_what_xla_gives(name, use_config):
    use_config(1, 2, 256, False)
    assert_close(transformed_gradients(name, "triton"), transformed_gradients(name, "xla"), 1e-5)


def test_platform_is_chosen_at_lowering(monkeypatch, use_config):
    # With an NVIDIA GPU beside the CPU the same traced function still lowers for the CPU.
    use_config(1, 2, 256, False)
    monkeypatch.setattr(dispatch, "kernel_available", lambda: True)
    monkeypatch.setattr(dispatch, "SMALLEST", 0)
    for name in ("jit", "remat", "vmap", "scan", "shard_map"):
        expected = transformed_gradients(name, "xla")
        assert_close(transformed_gradients(name, None), expected, 1e-6)


def test_missing_kernel_falls_back_with_one_warning(monkeypatch):
    def missing(module):
        raise ImportError(f"{module} needs {dispatch.INSTALL}")

    monkeypatch.setattr(jax, "devices", lambda platform: ["cuda:0"])
    monkeypatch.setattr(dispatch, "_import", missing)
    monkeypatch.setattr(dispatch, "SMALLEST", 0)
    dispatch.kernel_available.cache_clear()
    values, weights = (jnp.ones(s) for s in ((1, 2, 2, 8), (1, 2, 2, 1, 9, 1)))
    try:
        with pytest.warns(UserWarning, match="pip install 'jax-triton"):
            local_aggregation(values, weights)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            local_aggregation(values, weights)
    finally:
        dispatch.kernel_available.cache_clear()


def test_wrong_arguments_are_named(unchecked_shapes):
    values, weights = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 2, 1, 9, 1))
    with pytest.raises(ValueError, match="implementation must be one of"):
        local_aggregation(values, weights, implementation="cuda")
    with pytest.raises(ValueError, match=r"scale must be \(1, 9, 1\), not \(9,\)"):
        normalized_local_aggregation(values, weights, jnp.ones(9), jnp.ones((1, 9, 1)))
    with jax.enable_x64(True), pytest.raises(TypeError, match="not float64"):
        local_aggregation(
            jnp.ones((1, 2, 2, 8), jnp.float64),
            jnp.ones((1, 2, 2, 1, 9, 1), jnp.float64),
            implementation="triton",
        )


LOWERING = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cotnet_jax.ops.local_aggregation.shapes import AggregationShape
from cotnet_jax.ops.local_aggregation.triton import (
    backward_kernel, cooperative_kernels, forward_kernel, group_norm_kernels
)
from cotnet_jax.ops.local_aggregation.triton.configs import (
    AggregationConfig, CooperativeConfig, NormalizationConfig
)

MODULES = (cooperative_kernels, forward_kernel, backward_kernel, group_norm_kernels)
SHORT = {"x_ptr", "y_ptr", "w_ptr", "dx_ptr", "dy_ptr", "dw_ptr", "raw_dw_ptr"}
# Few rows and shares, which kernels write out one after the other, compile three times faster.
sizes = dict(SHAPE=AggregationShape(14, 14, 2, 2, 24), N=2, PIXELS=196, G=2, CW=24, TAPS=9,
             IMAGES=1, PIECES=2, LINES=98, RUN=216, EPSILON=1e-5, GROUPS=2, PROGRAMS=77)
for name, options in json.loads(sys.argv[1]):
    kernel = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    cooperative = name.startswith("cooperative")
    sizes["CONFIG"] = AggregationConfig(1, 2, 512, 2, False, reload=True)
    if cooperative:
        sizes["CONFIG"] = CooperativeConfig(48, 2, 64, 2, False, 1)
    elif "PIXELS" in kernel.arg_names:
        sizes["CONFIG"] = NormalizationConfig(512, 2, 3)
    constants = sizes | options
    for capability in json.loads(sys.argv[2]):
        dtype = "bf16" if capability == 90 else "fp16" if cooperative else "fp32"
        types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(SHORT, "*" + dtype)
        types |= dict.fromkeys(constants, "constexpr") | {"arrived_ptr": "*i32"}
        signature = {a: types[a] for a in kernel.arg_names}
        given = {a: constants[a] for a in kernel.arg_names if a in constants}
        built = compile(
            ASTSource(kernel, signature, given),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 2},
        )
        assert f".target sm_{capability}" in built.asm["ptx"], built.asm["ptx"][:500]
        print(name, capability, dtype, len(built.asm["ptx"]))
"""


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_kernels_lower_to_ptx(tmp_path, capability):
    variants = [(kernel, options) for kernel, some in KERNELS.items() for options in some]
    lines = lower_alone(LOWERING, tmp_path, json.dumps(variants), json.dumps([capability]))
    lowered = [line.split()[:2] for line in lines]
    assert lowered == [[kernel, str(capability)] for kernel, _ in variants]


def test_cpu_never_imports_triton():
    script = (
        "import jax, jax.numpy as jnp, sys, cotnet_jax\n"
        "values, weights = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 2, 1, 9, 1))\n"
        "jax.jit(cotnet_jax.local_aggregation)(values, weights)\n"
        "assert 'triton' not in sys.modules and 'jax_triton' not in sys.modules\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
