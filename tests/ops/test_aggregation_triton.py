"""The aggregation's GPU kernels without a GPU: in Triton's interpreter, and down to PTX."""

import functools
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import triton_interpreter  # noqa: F401  (first, or nothing interprets; may skip all)
from jax.sharding import PartitionSpec as P
from test_aggregation import loops

from cotnet_jax.ops.local_aggregation import dispatch, plain
from cotnet_jax.ops.local_aggregation.normalized import normalized_local_aggregation
from cotnet_jax.ops.local_aggregation.plain import local_aggregation
from cotnet_jax.ops.local_aggregation.triton import launch, tuned_h100
from cotnet_jax.ops.local_aggregation.triton.configs import (
    IN_PLACE_OF,
    NormTile,
    TeamTile,
    Tile,
    choose_norm_tile,
    choose_team_tile,
    choose_tile,
    smallest_block,
)
from cotnet_jax.tools import sanitize_kernels, tune_kernels

ROOT = pathlib.Path(__file__).parents[2]
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


@pytest.fixture
def use_tile(monkeypatch):
    """Makes all kernels work in one tile, in larger blocks than suit a GPU but fewer of them."""

    def use(parts, rows, block, prefetch):
        def choose(kernel, itemsize, h, w, groups, share, channels, taps):
            return Tile(parts, min(rows, h), block, 4, prefetch, reload=not prefetch)

        monkeypatch.setattr(launch, "choose_tile", choose)
        monkeypatch.setattr(launch, "team_tile", lambda *_: None)

    return use


def inputs(shape, seed=0):
    """Float64 values, weights, gradient, scale, bias, output scale and shift."""
    n, h, w, groups, share, channels, size = shape
    random = np.random.default_rng(seed)
    width = groups * share * channels
    taps = (groups, size**2, channels)
    shapes = [(n, h, w, width), (n, h, w, *taps), (n, h, w, width), taps, taps, (width,), (width,)]
    return [random.standard_normal(s) + (len(s) == 6) for s in shapes]


def composed(values, raw, scale, bias, *output):
    """Float64 group normalisation, aggregation and activation, from their definitions."""
    axes = (1, 2, 4)
    normal = (raw - raw.mean(axes, keepdims=True)) / jnp.sqrt(raw.var(axes, keepdims=True) + 1e-5)
    y = plain.xla_forward(values, normal * scale + bias)
    return jax.nn.silu(output[0] * y + output[1]) if output else y


def with_gradients(function, operands, gradient):
    value, pullback = jax.vjp(function, *operands)
    return [value, *pullback(gradient.astype(value.dtype))]


def assert_close(arrays, expected, tolerance):
    for index, (array, wanted) in enumerate(zip(arrays, expected, strict=True)):
        array, wanted = np.asarray(array, np.float64), np.asarray(wanted, np.float64)
        error = np.linalg.norm(array - wanted) / np.linalg.norm(wanted)
        assert error <= tolerance, f"result {index}: {error}"


@pytest.mark.parametrize(("shape", "tile"), CASES)
def test_kernels_match_plain_loops(shape, tile, use_tile):
    use_tile(*tile)
    values, weights, gradient = inputs(shape)[:3]
    call = functools.partial(local_aggregation, implementation="triton")
    arrays = [jnp.asarray(a, jnp.float32) for a in (values, weights)]
    got = with_gradients(call, arrays, jnp.asarray(gradient))
    assert_close(got, loops(values, weights, gradient), TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_take_short_floats(dtype, use_tile):
    use_tile(1, 4, 256, True)
    arrays = [jnp.asarray(a, dtype) for a in inputs((1, 4, 3, 1, 8, 8, 3))[:3]]
    call = functools.partial(local_aggregation, implementation="triton")
    got = with_gradients(call, arrays[:2], arrays[2])
    assert all(a.dtype == dtype for a in got)
    # The interpreter cuts off, where a GPU rounds to nearest.
    assert_close(got, loops(*(np.asarray(a, np.float64) for a in arrays)), TOLERANCE[dtype])


def check_normalized(shape, implementation, activated, dtype="float32"):
    """Compares the normalised aggregation and its gradients with float64, from its definition."""
    values, raw, gradient, *parameters = inputs(shape)
    values, raw, gradient = (
        np.asarray(jnp.asarray(a, dtype), np.float64) for a in (values, raw, gradient)
    )
    parameters = parameters[: 4 if activated else 2]
    with jax.enable_x64(True):
        operands = [jnp.asarray(a) for a in (values, raw, *parameters)]
        expected = with_gradients(composed, operands, jnp.asarray(gradient))
        expected = [np.asarray(a) for a in expected]

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
@pytest.mark.parametrize(("shape", "tile"), CASES[1:4])
def test_normalized_aggregation_matches_its_composition(
    shape, tile, implementation, activated, use_tile
):
    use_tile(*tile)
    check_normalized(shape, implementation, activated)


# Shape as in CASES; slice, rows, lanes, prefetch; programs on the whole GPU.
TEAMS = [
    ((1, 5, 7, 1, 8, 8, 3), (8, 3, 32, False), 9),
    ((3, 3, 3, 2, 2, 6, 3), (12, 3, 32, True), 4),
    ((2, 3, 1, 1, 1, 3, 3), (3, 2, 2, False), 0),
    ((1, 3, 4, 2, 2, 3, 5), (6, 2, 16, True), 99),
    # Teams of two and of one.
    ((2, 4, 3, 2, 1, 4, 3), (2, 2, 8, False), 99),
    ((3, 3, 4, 2, 1, 4, 3), (4, 3, 16, True), 2),
]


# Each dtype takes one of the two forms, and few shapes both, to save time.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "bfloat16") for case in TEAMS), *((case, "float16") for case in TEAMS[1:6:2])],
)
def test_normalized_aggregation_by_teams(case, dtype, monkeypatch):
    shape, tile, programs = case
    activated = dtype == "float16"
    *sizes, prefetch = tile
    tile = TeamTile(*sizes, 1, prefetch, resident=programs)
    monkeypatch.setattr(launch, "team_tile", lambda *_: tile)
    monkeypatch.setattr(launch, "multiprocessors", lambda: 1)
    check_normalized(shape, "triton", activated, dtype)


KERNELS = (
    *("forward", "normalized_forward", "activated_forward", "backward"),
    *("normalized_backward", "statistics", "group_norm_backward"),
    *("team_forward", "team_activated_forward", "team_backward"),
)


def test_the_memory_check_runs_every_kernel(monkeypatch):
    called = set()
    call = launch.call_kernel

    def note(kernel, *arguments, **constants):
        called.add((kernel.fn.__name__, constants.get("RELOAD")))
        return call(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "call_kernel", note)
    tile = TeamTile(2, 1, 4, 1, False, resident=1)
    monkeypatch.setattr(launch, "multiprocessors", lambda: 1)
    monkeypatch.setattr(sanitize_kernels, "SHAPES", [((2, 3, 1, 2, 16), tile)])
    sanitize_kernels.run_kernels()
    assert {name for name, _ in called} == set(KERNELS)
    assert {reload for name, reload in called if name == "activated_forward"} == {False, True}


@pytest.mark.parametrize(("groups", "channels"), [(1, 4), (1, 3), (2, 4), (2, 3)])
# More pictures than programs, and fewer.
@pytest.mark.parametrize("programs", [2, 9])
def test_normalization_in_many_blocks(programs, groups, channels, use_tile, monkeypatch):
    use_tile(1, 4, 256, False)
    monkeypatch.setattr(launch, "PROGRAMS", programs)

    def choose(kernel, itemsize, h, w, groups, channels, taps):
        return NormTile(smallest_block(kernel, groups, channels, taps), 4, 3)

    monkeypatch.setattr(launch, "choose_norm_tile", choose)
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
def test_statistics_are_near_the_exact_ones(mean, use_tile):
    """An error in them is one of all of a picture's weights, which networks amplify."""
    use_tile(1, 4, 256, False)
    raw = np.random.default_rng(0).standard_normal((2, 14, 14, 1, 9, 8)) + mean
    raw = raw.astype(np.float32)
    got = launch.statistics(jnp.asarray(raw), 1e-5)
    got_mean, got_factor = (np.asarray(a, np.float64)[:, :, 0] for a in got)
    axes, exact = (1, 2, 4), raw.astype(np.float64)
    deviation = np.sqrt(exact.var(axes) + 1e-5)
    assert np.sqrt(np.mean((got_factor * deviation - 1) ** 2)) < 1.5e-7
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


@pytest.mark.parametrize(
    "name",
    [
        *("jit", "remat", "vmap", "vmap parameters", "vmap of jit, one operand"),
        *("scan", "shard_map"),
    ],
)
def test_transformations_give_what_xla_gives(name, use_tile):
    use_tile(1, 2, 256, False)
    operands = inputs((2, 2, 2, 2, 2, 3, 3))
    operands = [jnp.asarray(operands[i], jnp.float32) for i in (0, 1, 3, 4)]
    got, expected = (
        transformed(name, functools.partial(losses, implementation=implementation))(*operands)
        for implementation in ("triton", "xla")
    )
    assert_close(got, expected, 1e-5)


def test_platform_is_chosen_at_lowering(monkeypatch, use_tile):
    # With an NVIDIA GPU beside the CPU the same traced function still lowers for the CPU.
    use_tile(1, 2, 256, False)
    monkeypatch.setattr(dispatch, "kernel_available", lambda: True)
    operands = inputs((1, 2, 2, 1, 2, 3, 3))
    operands = [jnp.asarray(operands[i], jnp.float32) for i in (0, 1, 3, 4)]
    for name in ("jit", "remat", "vmap", "scan", "shard_map"):
        function = transformed(name, functools.partial(losses, implementation=None))
        expected = transformed(name, functools.partial(losses, implementation="xla"))(*operands)
        assert_close(function(*operands), expected, 1e-6)


def test_missing_kernel_falls_back_with_one_warning(monkeypatch):
    def missing():
        raise ImportError(f"needs {dispatch.INSTALL}")

    monkeypatch.setattr(jax, "devices", lambda platform: ["cuda:0"])
    monkeypatch.setattr(dispatch, "_triton", missing)
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


def test_wrong_arguments_are_named():
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


def test_table_has_all_shapes_of_the_models_and_tiles_fit():
    for kernel, itemsize, (size, groups, width) in (
        (k, i, s)
        for k in tune_kernels.AGGREGATIONS + tune_kernels.NORMALIZATIONS
        for i in tune_kernels.DTYPES
        for s in tune_kernels.SHAPES
    ):
        channels = width // groups // 8
        if kernel in tune_kernels.NORMALIZATIONS and itemsize == 4:
            continue  # they take the nearest shape's
        key = tune_kernels.table_key(kernel, itemsize, size, groups, channels)
        assert key in tuned_h100.TABLE[kernel], f"{kernel} {key}: tune it"
    for shape in ((56, 1, 8, 8, 9), (9, 2, 8, 6, 9), (5, 1, 3, 7, 25), (14, 1, 64, 1, 9)):
        size, groups, share, channels, taps = shape
        for kernel in (*tune_kernels.AGGREGATIONS, "activated_forward"):
            tile = choose_tile(kernel, 2, size, size, groups, share, channels, taps)
            assert share % tile.parts == 0 and 1 <= tile.rows <= size
            assert tile.block >= 32 * tile.warps
            if tile.parts > 1 and "backward" in kernel:
                assert tile.block % (tile.parts * channels) == 0
        for kernel in tune_kernels.NORMALIZATIONS:
            tile = choose_norm_tile(kernel, 2, size, size, groups, channels, taps)
            assert tile.block >= smallest_block(kernel, groups, channels, taps)
        for kernel in IN_PLACE_OF:
            shape = (2, size, size, groups, share, channels, taps)
            tile = choose_team_tile(kernel, 132, *shape)
            if tile is not None:
                members = tile.members(size, size)
                assert tile.rows <= size and members <= 132
                assert choose_team_tile(kernel, members, *shape) == tile
                assert choose_team_tile(kernel, members - 1, *shape) is None


def test_one_kernel_does_both_only_where_that_was_faster(monkeypatch):
    table = {kernel: {} for kernel in tuned_h100.TABLE}
    table["normalized_forward"] = {(2, s, s, 1, 8, 512 // s): (1, s, 64, 2, False) for s in (8, 32)}
    table["team_forward"] = {(2, 8, 8, 1, 8, 64): (16, 8, 64, 1, False, 1)}
    monkeypatch.setattr("cotnet_jax.ops.local_aggregation.triton.configs.TABLE", table)

    def tile(h, w, channels, taps=9, multiprocessors=16):
        kernel = "team_activated_forward"
        return choose_team_tile(kernel, multiprocessors, 2, h, w, 1, 8, channels, taps)

    assert tile(8, 8, 64) == TeamTile(16, 8, 64, 1, False, 1)
    assert tile(32, 32, 16) is None and tile(30, 34, 16) is None
    assert tile(10, 7, 64) == TeamTile(16, 5, 64, 1, False, 1)
    assert tile(8, 8, 60) == TeamTile(60, 8, 64, 1, False, 1)
    assert tile(8, 8, 64, taps=25) is None
    # A team of eight, on a smaller GPU.
    assert tile(8, 8, 60, multiprocessors=8) and tile(8, 8, 60, multiprocessors=7) is None


def test_tuning_takes_the_fastest_and_one_kernel_where_it_is_faster_than_two():
    shape = (8, 1, 512)
    jobs = [(kernel, 2, shape) for kernel in tune_kernels.KERNELS]
    shares = tune_kernels.share_out(jobs, workers=3)
    tiles = {job: [] for job in jobs}
    for job, some in (bundle for share in shares for bundle in share):
        tiles[job] += some
    assert all(len(tiles[job]) == len(set(tiles[job])) > 2 for job in jobs)
    for job in jobs:
        sizes = [len(some) for share in shares for other, some in share if other == job]
        assert max(sizes) <= tune_kernels.BUNDLE

    times = {job: {tile: 10.0 + i for i, tile in enumerate(tiles[job])} for job in jobs}
    times["team_forward", 2, shape][tiles["team_forward", 2, shape][2]] = 9.0
    times["team_backward", 2, shape] = dict.fromkeys(tiles["team_backward", 2, shape], 21.0)
    key = (2, 8, 8, 1, 8, 64)
    table = {kernel: {} for kernel in tune_kernels.KERNELS}
    table["team_backward"][key] = "slower than two now"
    tune_kernels.choose(table, times)
    assert table["team_forward"][key] == tuple(vars(tiles["team_forward", 2, shape][2]).values())
    assert key not in table["team_backward"]
    assert table["forward"][key] == tuple(vars(tiles["forward", 2, shape][0]).values())
    assert table["statistics"][2, 8, 8, 1, 64]


LOWERING = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cotnet_jax.ops.local_aggregation.triton import (
    aggregation_kernels, cooperative_kernels, group_norm_kernels
)

MODULES = (aggregation_kernels, group_norm_kernels, cooperative_kernels)
SHORT = {"x_ptr", "y_ptr", "w_ptr", "dx_ptr", "dy_ptr", "dw_ptr", "raw_dw_ptr"}
# Few rows and shares, which kernels write out one after the other, compile three times faster.
sizes = dict(COLUMNS=28, H=14, W=14, G=2, SHARE=2, CW=24, K=3, TAPS=9, PARTS=1, ROWS=2, N=2,
             PICTURES=1, PIECES=2, LINES=98, RUN=216, STAGES=3, BLOCK=0, PREFETCH=False,
             RELOAD=True, EPSILON=1e-5, TEAMS=2, MEMBERS=77, SLICE=48)
for name in sys.argv[1:]:
    (kernel,) = (getattr(module, name) for module in MODULES if hasattr(module, name))
    by_teams = name.startswith("team")
    sizes["BLOCK"] = 64 if by_teams else 512
    for capability, dtype in ((80, "fp16" if by_teams else "fp32"), (90, "bf16")):
        types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(SHORT, "*" + dtype)
        types |= dict.fromkeys(sizes, "constexpr") | {"arrived_ptr": "*i32"}
        signature = {a: types[a] for a in kernel.arg_names}
        built = compile(
            ASTSource(kernel, signature, {a: sizes[a] for a in kernel.arg_names if a in sizes}),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 2},
        )
        assert f".target sm_{capability}" in built.asm["ptx"], built.asm["ptx"][:500]
        print(name, capability, dtype, len(built.asm["ptx"]))
"""


def test_kernels_lower_to_ptx(tmp_path):
    # Another process, because this one's Triton interprets.
    result = subprocess.run(
        [sys.executable, "-c", LOWERING, *KERNELS],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lowered = [line.split()[0] for line in result.stdout.splitlines()]
    assert lowered == [kernel for kernel in KERNELS for _ in ("sm_80", "sm_90")]


def test_cpu_never_imports_triton():
    script = (
        "import jax, jax.numpy as jnp, sys, cotnet_jax\n"
        "values, weights = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 2, 1, 9, 1))\n"
        "jax.jit(cotnet_jax.local_aggregation)(values, weights)\n"
        "assert 'triton' not in sys.modules and 'jax_triton' not in sys.modules\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
