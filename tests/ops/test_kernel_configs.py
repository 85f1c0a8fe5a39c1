"""The configurations of the kernels: how one is chosen, and the files that they come from."""

import functools
import json

import pytest
from helpers import triton_interpreter  # noqa: F401  (skips all without triton)

from cotnet_jax.models.variants import VARIANTS
from cotnet_jax.ops.local_aggregation import shapes
from cotnet_jax.ops.local_aggregation.shapes import MODEL_SHAPES, AggregationShape
from cotnet_jax.ops.local_aggregation.triton import configs, tuned_configs
from cotnet_jax.ops.local_aggregation.triton.configs import (
    CONFIG_CLASSES,
    IN_PLACE_OF,
    AggregationConfig,
    CooperativeConfig,
    NormalizationConfig,
)
from cotnet_jax.tools import check_kernels, tune_kernels

pytestmark = pytest.mark.kernels
H100 = tuned_configs.Gpu("NVIDIA H100 80GB HBM3", "9.0", 132)
TABLE = tuned_configs.nearest(H100).table
AGGREGATIONS = [k for k, c in CONFIG_CLASSES.items() if c is AggregationConfig]
NORMALIZATIONS = [k for k, c in CONFIG_CLASSES.items() if c is NormalizationConfig]


def test_table_has_all_shapes_of_the_models_and_configs_fit():
    for kernel, itemsize, shape in (
        (k, i, s)
        for k in AGGREGATIONS + NORMALIZATIONS
        for i in tune_kernels.DTYPES
        for s in shapes.SHAPES
    ):
        key = configs.table_key(kernel, itemsize, shape)
        assert key in TABLE[kernel], f"{kernel} {key}: tune it"
    for sizes in ((56, 1, 8, 8, 3), (9, 2, 8, 6, 3), (5, 1, 3, 7, 5), (14, 1, 64, 1, 3)):
        size, groups, share, channels, kernel_size = sizes
        shape = AggregationShape(size, size, groups, share, channels, kernel_size)
        for kernel in AGGREGATIONS:
            config = configs.choose_config(TABLE, kernel, 2, shape)
            assert share % config.parts == 0 and 1 <= config.rows <= size
            assert config.block >= 32 * config.num_warps
            if config.parts > 1 and "backward" in kernel:
                assert config.block % (config.parts * channels) == 0
        for kernel in NORMALIZATIONS:
            config = configs.choose_normalization_config(TABLE, kernel, 2, shape)
            smallest = configs.smallest_block(kernel, groups, channels, kernel_size**2)
            assert config.block >= smallest
        for kernel in IN_PLACE_OF:
            choose = functools.partial(configs.choose_cooperative_config, TABLE, kernel)
            config = choose(132, 2, shape)
            if config is not None:
                programs = config.programs(size, size)
                assert config.rows <= size and programs <= 132
                assert choose(programs, 2, shape) == config
                assert choose(programs - 1, 2, shape) is None


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_the_shapes_are_those_of_the_models(name):
    assert check_kernels.aggregation_shapes(name, VARIANTS[name].input_size).issuperset(
        MODEL_SHAPES[name]
    )


def test_one_kernel_does_both_only_where_that_was_faster():
    table = {kernel: {} for kernel in CONFIG_CLASSES}
    table["normalized_forward"] = {
        (2, s, s, 1, 8, 512 // s): AggregationConfig(1, s, 64, 2, False, False) for s in (8, 32)
    }
    measured = CooperativeConfig(16, 8, 64, 1, False, 1)
    table["cooperative_forward"] = {(2, 8, 8, 1, 8, 64): measured}

    def choose(h, w, channels, kernel_size=3, multiprocessors=16):
        shape = AggregationShape(h, w, 1, 8, channels, kernel_size)
        kernel = "cooperative_forward"
        return configs.choose_cooperative_config(table, kernel, multiprocessors, 2, shape)

    assert choose(8, 8, 64) == measured
    assert choose(32, 32, 16) is None and choose(30, 34, 16) is None
    assert choose(10, 7, 64) == CooperativeConfig(16, 5, 64, 1, False, 1)
    assert choose(8, 8, 60) == CooperativeConfig(60, 8, 64, 1, False, 1)
    assert choose(8, 8, 64, kernel_size=5) is None
    # A cooperative group of eight programs, on a smaller GPU.
    assert choose(8, 8, 60, multiprocessors=8) and choose(8, 8, 60, multiprocessors=7) is None


def test_tuning_takes_the_fastest_and_one_kernel_where_it_is_faster_than_two():
    shape = AggregationShape(8, 8, 1, 8, 64)
    jobs = [(kernel, 2, shape) for kernel in CONFIG_CLASSES]
    shares = tune_kernels.share_out(jobs, workers=3)
    some = {job: [] for job in jobs}
    for job, bundle in (bundle for share in shares for bundle in share):
        some[job] += bundle
    assert all(len(some[job]) == len(set(some[job])) > 2 for job in jobs)
    for job in jobs:
        sizes = [len(bundle) for share in shares for other, bundle in share if other == job]
        assert max(sizes) <= tune_kernels.BUNDLE

    times = {job: {config: 10.0 + i for i, config in enumerate(some[job])} for job in jobs}
    forward, backward = ((f"cooperative_{way}", 2, shape) for way in ("forward", "backward"))
    times[forward][some[forward][2]] = 9.0
    times[backward] = dict.fromkeys(some[backward], 21.0)
    key = (2, 8, 8, 1, 8, 64)
    table = {kernel: {} for kernel in CONFIG_CLASSES}
    table["cooperative_backward"][key] = "slower than two now"
    tune_kernels.choose(table, times)
    assert table["cooperative_forward"][key] == some[forward][2]
    assert key not in table["cooperative_backward"]
    assert table["forward"][key] == some["forward", 2, shape][0]
    assert table["statistics"][2, 8, 8, 1, 64]


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA TITAN V", "nvidiatitanv"),
    ],
)
def test_the_file_is_named_after_the_gpu(device_kind, name):
    assert H100._replace(device_kind=device_kind).name == name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with files of three made-up GPUs."""
    monkeypatch.setattr(tuned_configs, "FOLDER", tmp_path)
    tuned_configs.nearest.cache_clear()
    for gpu in (("GPU X1", "8.0", 108), ("GPU X2", "9.0", 60), ("GPU X3", "9.0", 150)):
        gpu = tuned_configs.Gpu(*gpu)
        tuned_configs.write(tuned_configs.TunedConfigs(gpu, TABLE), tmp_path / f"{gpu.name}.json")
    yield tmp_path
    tuned_configs.nearest.cache_clear()


def test_a_gpu_without_a_file_uses_the_nearest_and_the_benchmark_line_says_so(folder):
    for gpu, nearest in (
        (("GPU X3", "8.0", 108), "GPU X3"),
        (("GPU Y1", "8.6", 150), "GPU X3"),
        (("GPU Y2", "8.0", 60), "GPU X1"),
        (("GPU Y3", "10.0", 70), "GPU X2"),
    ):
        gpu = tuned_configs.Gpu(*gpu)
        tuned = tuned_configs.nearest(gpu)
        assert tuned.gpu.device_kind == nearest and tuned.table == TABLE
        line = tuned_configs.describe(gpu)
        assert line.startswith(f"kernel configs: measured on {nearest}")
        assert (f"the nearest to {gpu.device_kind}" in line) == (gpu.device_kind != nearest)


def test_the_file_in_the_package_is_as_it_would_be_written(tmp_path):
    path = tuned_configs.FOLDER / "h100.json"
    tuned_configs.write(tuned_configs.read(path), tmp_path / "h100.json")
    assert (tmp_path / "h100.json").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["kernels"].pop("backward"), "kernels are"),
        (lambda c: c["kernels"]["backward"]["config"].reverse(), "config of backward is"),
        (lambda c: c["kernels"]["backward"]["tuned"][0][1].append(1), "backward has"),
        (lambda c: c["kernels"]["backward"]["tuned"][0][1].__setitem__(0, True), "backward has"),
        (lambda c: c.pop("gpu"), "'gpu'"),
    ],
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    content = json.loads((tuned_configs.FOLDER / "h100.json").read_text())
    change(content)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        tuned_configs.read(path)
    assert str(path) in str(error.value) and "tune_kernels" in str(error.value)
