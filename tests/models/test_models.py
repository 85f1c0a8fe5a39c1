"""The network: sizes, initial weights, shapes, and what has no reference values."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import cotnet_jax
from cotnet_jax.layers import BatchNorm
from cotnet_jax.models import variants
from cotnet_jax.ops.pooling import windows
from cotnet_jax.training.utilization import count_products

pytestmark = pytest.mark.end_to_end

# spec of the published models and of the two larger ones
PARAMETERS = {
    "cotnet50": 22_222_416,
    "cotnext50_2x48d": 30_046_276,
    "se_cotnetd_50": 23_107_784,
    "cotnet101": 38_272_048,
    "cotnext101_2x48d": 53_346_068,
    "se_cotnetd_101": 40_912_392,
    "se_cotnetd_152": 55_783_688,
    "se_cotnetd_152_L": 55_783_688,
    "se_cotnetd_200": 60_399_368,
    "se_cotnetd_270": 83_380_648,
    "cotnet_tiny": 972_930,
}
GMACS = {
    "cotnet50": 3.23,
    "cotnext50_2x48d": 4.24,
    "se_cotnetd_50": 4.05,
    "cotnet101": 6.03,
    "cotnext101_2x48d": 8.04,
    "se_cotnetd_101": 8.43,
    "se_cotnetd_152": 16.83,
    "se_cotnetd_152_L": 26.29,
    "se_cotnetd_200": 21.39,
    "se_cotnetd_270": 27.54,
}


@functools.cache
def traced(name, channels=3, **options):
    """Its jaxpr for one image of the model's size, and shapes of the variables.

    Tracing a large network takes seconds: initialisation computes the logits too, and gives both.
    """
    model = cotnet_jax.create_model(name, **options)
    height, width, _ = model.default_cfg["input_size"]
    images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    init = functools.partial(jax.jit(model.init), jax.random.key(0))
    return jax.make_jaxpr(init, return_shape=True)(images)


def shapes(name, **options):
    """Of the variables, for images of any size."""
    return traced(name, **options)[1]


def output_shape(model, variables, image_shape, **options):
    apply = functools.partial(model.apply, **options)
    return jax.eval_shape(apply, variables, jax.ShapeDtypeStruct(image_shape, jnp.float32))


def create_shallow(name, most_blocks=2, **options):
    """A model with so many blocks a stage: those after the second are as that one."""
    model = cotnet_jax.create_model(name, **options)
    blocks = tuple(min(count, most_blocks) for count in model.variant.blocks)
    return model.clone(variant=dataclasses.replace(model.variant, blocks=blocks))


@functools.cache
def shallow_shapes(name, channels=3, **options):
    """Of the variables of ``create_shallow``'s model."""
    images = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    return jax.eval_shape(create_shallow(name, **options).init, jax.random.key(0), images)


@pytest.fixture(scope="module")
def tiny():
    model = cotnet_jax.create_model("cotnet_tiny", num_classes=10)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    return model, jax.jit(model.init)(jax.random.key(0), images), images


# Deeper ones of the same blocks, which take five to ten seconds each to trace.
DEEP = ("se_cotnetd_152", "se_cotnetd_152_L", "se_cotnetd_200", "se_cotnetd_270")


def slow_where_deep(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in DEEP else name for name in names]


@pytest.mark.parametrize("name", slow_where_deep(cotnet_jax.list_models()))
def test_parameter_count(name):
    leaves = jax.tree.leaves(shapes(name)["params"])
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]
    assert variants.VARIANTS[name].parameters == PARAMETERS[name]


def test_the_tables_hold_every_model():
    assert set(cotnet_jax.list_models()) == set(PARAMETERS)
    assert set(PARAMETERS) - set(GMACS) == {"cotnet_tiny"}


@pytest.mark.parametrize("name", slow_where_deep(GMACS))
def test_multiplications_of_convolutions_and_classifier(name):
    total = count_products(traced(name)[0].jaxpr)
    assert total / 1e9 == pytest.approx(GMACS[name], abs=0.02)
    assert variants.VARIANTS[name].gmacs == GMACS[name]


@pytest.mark.parametrize("name", GMACS)
@pytest.mark.parametrize("most_blocks", [2, pytest.param(99, marks=pytest.mark.slow)])
def test_features_of_every_stage(name, most_blocks, unchecked_shapes):
    """At a size that no stage divides."""
    backbone = cotnet_jax.create_model(name, features_only=True, out_indices=(0, 1, 2, 3, 4))
    infos = backbone.feature_info
    assert [info.name for info in infos] == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert [info.index for info in infos] == [0, 1, 2, 3, 4]
    assert [info.reduction for info in infos] == [2, 4, 8, 16, 32]
    assert [info.channels for info in infos][1:] == [256, 512, 1024, 2048]
    assert cotnet_jax.create_model(name).feature_info == infos
    backbone = backbone.clone(variant=create_shallow(name, most_blocks).variant)
    images = jax.ShapeDtypeStruct((1, 800, 1333, 3), jnp.float32)
    features, _ = jax.eval_shape(backbone.init_with_output, jax.random.key(0), images)
    assert [stage.shape for stage in features] == [
        (1, -(-800 // info.reduction), -(-1333 // info.reduction), info.channels) for info in infos
    ]


def test_an_unknown_name_answers_with_the_nearest():
    with pytest.raises(ValueError, match="'cotnet-50': did you mean 'cotnet50'"):
        cotnet_jax.create_model("cotnet-50")


def test_all_attributes_out_of_range_are_listed():
    with pytest.raises(ValueError, match=r"num_classes .* output_stride .* drop_rate"):
        cotnet_jax.create_model("cotnet50", num_classes=-1, output_stride=4, drop_rate=1.0)


@pytest.mark.parametrize("shape", [(2, 32, 32), (2, 0, 32, 3), (2, 32, 32, 0)])
def test_images_of_no_size_are_refused(tiny, shape, unchecked_shapes):
    model, variables, _ = tiny
    with pytest.raises(ValueError, match="images must be"):
        model.apply(variables, jnp.zeros(shape))


@pytest.mark.parametrize("name", ["cotnet50", "se_cotnetd_50", "se_cotnetd_152"])
@pytest.mark.parametrize("size", [(1, 1), (33, 57), (97, 64)])
def test_any_input_size_channels_and_classes(name, size):
    model = create_shallow(name, num_classes=7)
    variables = shallow_shapes(name, channels=5, num_classes=7)
    assert output_shape(model, variables, (2, *size, 5)).shape == (2, 7)


def test_no_classes_gives_pooled_features():
    model = create_shallow("cotnet50", num_classes=0)
    variables = shallow_shapes("cotnet50", num_classes=0)
    assert output_shape(model, variables, (2, 64, 64, 3)).shape == (2, 2048)


@pytest.mark.parametrize("name", ["cotnet50", "se_cotnetd_50", "se_cotnetd_152"])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_output_stride(name, stride):
    model = create_shallow(name, output_stride=stride)
    shape = (1, 128, 128, 3)
    _, state = output_shape(model, shallow_shapes(name), shape, mutable=["intermediates"])
    assert state["intermediates"]["stage4_features"][0].shape[1] == 128 // stride


@pytest.mark.parametrize("stride", [8, 16])
def test_feature_info_tells_the_output_stride(stride, unchecked_shapes):
    backbone = cotnet_jax.create_model("cotnet50", features_only=True, output_stride=stride)
    assert [info.index for info in backbone.feature_info] == [1, 2, 3, 4]
    for info, stage in zip(
        backbone.feature_info,
        output_shape(backbone, shapes("cotnet50"), (1, 128, 96, 3)),
        strict=True,
    ):
        assert stage.shape == (1, 128 // info.reduction, 96 // info.reduction, info.channels)
    assert backbone.feature_info[-1].reduction == stride


def test_what_comes_after_the_last_index_is_not_built():
    backbone = cotnet_jax.create_model("cotnet_tiny", features_only=True, out_indices=[0, 2])
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    features, variables = jax.eval_shape(backbone.init_with_output, jax.random.key(0), images)
    assert [stage.shape for stage in features] == [(1, 16, 16, 32), (1, 8, 8, 128)]
    whole = shapes("cotnet_tiny")
    for collection, modules in variables.items():
        assert set(modules) == {"stem", "stage1_block0", "stage2_block0"}
        assert modules == {name: whole[collection][name] for name in modules}
    stem = cotnet_jax.create_model("cotnet_tiny", features_only=True, out_indices=(0,))
    assert set(jax.eval_shape(stem.init, jax.random.key(0), images)["params"]) == {"stem"}


def test_a_smaller_output_stride_dilates_split_attention():
    model = cotnet_jax.create_model("se_cotnetd_50", output_stride=8)
    images = jnp.zeros((1, 64, 64, 3))
    jaxpr = str(jax.make_jaxpr(model.apply)(shapes("se_cotnetd_50"), images))
    # Stage 3 holds three split-attention blocks; strided convolutions are left to stages 1, 2.
    assert jaxpr.count("rhs_dilation=(2, 2)") == 3


def test_logits_are_float32_in_bfloat16_models():
    model = cotnet_jax.create_model("cotnet_tiny", dtype=jnp.bfloat16)
    assert output_shape(model, shapes("cotnet_tiny"), (2, 32, 32, 3)).dtype == jnp.float32


def test_bfloat16_is_near_float32(tiny):
    model, variables, images = tiny
    exact = jax.jit(model.apply)(variables, images)
    rounded = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, images)
    assert np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)


def test_initial_weights(tiny):
    _, variables, _ = tiny
    model = cotnet_jax.create_model("cotnet50")

    @jax.jit
    def some(key):
        """Of a block and the head: the other 15 blocks take long to compile."""
        params = model.init(key, jnp.zeros((1, 32, 32, 3)))["params"]
        return params["stage4_block2"], params["head"]

    block, head = some(jax.random.key(0))
    key_conv = block["cot"]["key_conv"]["kernel"]
    assert key_conv.shape == (3, 3, 128, 512)
    assert np.std(key_conv) == pytest.approx(np.sqrt(2 / (9 * 512)), rel=0.01)
    for leaf, fan_in in (
        (head["kernel"], 2048),
        (head["bias"], 2048),
        (block["cot"]["weight_conv2"]["bias"], 256),
        (block["cot"]["fusion_conv2"]["bias"], 256),
    ):
        assert np.abs(leaf).max() == pytest.approx(1 / np.sqrt(fan_in), rel=0.05)
        assert np.abs(leaf).max() <= 1 / np.sqrt(fan_in)
    assert not np.any(block["bn3"]["scale"])
    assert np.all(block["bn1"]["scale"] == 1)
    assert np.all(variables["batch_stats"]["stem"]["bn"]["var"] == 1)


def test_drop_path_rises_linearly_over_the_blocks():
    model = cotnet_jax.create_model("cotnet50", drop_path_rate=0.15)
    rates = [block["drop_path_rate"] for stage in model.bottlenecks() for block in stage]
    np.testing.assert_allclose(rates, 0.15 * np.arange(16) / 15)


def test_dropping_changes_training_only(tiny):
    model, variables, images = tiny
    dropping = model.clone(drop_rate=0.5, drop_path_rate=0.5)
    evaluated = (jax.jit(each.apply)(variables, images) for each in (dropping, model))
    np.testing.assert_array_equal(*evaluated)
    apply = jax.jit(functools.partial(dropping.apply, train=True, mutable=["batch_stats"]))

    def logits(seed):
        return apply(variables, images, rngs={"dropout": jax.random.key(seed)})[0]

    assert not np.array_equal(logits(0), logits(1))
    np.testing.assert_array_equal(logits(0), logits(0))


@pytest.mark.parametrize("name", ["cotnet50", "se_cotnetd_50"])
def test_every_batch_norm_of_a_model_is_frozen(name, monkeypatch):
    monkeypatch.delattr(BatchNorm, "_count")
    options = {"train": True, "mutable": ["batch_stats"]}
    model = create_shallow(name, freeze_batch_norm=True)
    shape = (2, 64, 64, 3)
    output_shape(model, shallow_shapes(name), shape, **options)
    with pytest.raises(AttributeError):
        output_shape(model.clone(freeze_batch_norm=False), shallow_shapes(name), shape, **options)


def test_the_poolings_have_the_models_implementation(monkeypatch):
    chosen = set()

    def note(launch, implementation, kernel, xla, *operands, **constants):
        del launch
        chosen.add((kernel, implementation))
        return xla(*operands, **constants)

    monkeypatch.setattr(windows, "dispatch", note)
    options = {"features_only": True, "out_indices": (2,), "implementation": "xla"}
    model = cotnet_jax.create_model("cotnet50", **options)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    jax.eval_shape(model.init, jax.random.key(0), images)
    assert chosen == {("max_pool", "xla"), ("average_pool", "xla")}


# With loaded weights, as in docs/features.md: tests/test_features.py.
@pytest.mark.slow
def test_the_model_gives_the_same_logits_through_nnx(tiny):
    model, variables, images = tiny
    module = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(images)
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    bridged = {name: nnx.to_pure_dict(nnx.state(module, kind)) for name, kind in kinds.items()}
    assert jax.tree.structure(bridged) == jax.tree.structure(variables)
    np.testing.assert_array_equal(module(images), model.apply(bridged, images))


def test_intermediates_of_a_cot_layer(tiny):
    model, variables, images = tiny
    apply = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
    _, state = apply(variables, images)
    layer = state["intermediates"]["stage1_block0"]["cot"]
    weights = layer["aggregation_weights"][0]
    assert weights.shape == (2, 16, 16, 1, 9, 2)
    # Group normalisation with its initial scale and bias.
    np.testing.assert_allclose(np.mean(weights, (1, 2, 4)), 0, atol=1e-5)
    assert layer["static"][0].shape == layer["dynamic"][0].shape == (2, 16, 16, 16)


def test_a_cot_layer_stands_in_for_a_convolution():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return cotnet_jax.CoTLayer(kernel_size=5, groups=2, key_groups=2)(x, train)

    images = jnp.zeros((2, 9, 7, 32))
    assert Net().init_with_output(jax.random.key(0), images)[0].shape == images.shape


def test_channels_that_do_not_suit_the_groups():
    with pytest.raises(ValueError, match=r"20 channels are not a multiple of groups \* 8 = 8"):
        cotnet_jax.CoTLayer().init(jax.random.key(0), jnp.zeros((1, 4, 4, 20)))


def test_exports_for_any_batch_and_platform(tiny):
    model, variables, images = tiny
    apply = jax.jit(model.clone(implementation="xla").apply)
    batch = jax.ShapeDtypeStruct(export.symbolic_shape("n, 32, 32, 3"), images.dtype)
    file = export.export(apply, platforms=("cpu", "cuda", "tpu"))(variables, batch).serialize()
    for some in (images, images[:1]):
        logits = export.deserialize(file).call(variables, some)
        np.testing.assert_allclose(logits, apply(variables, some), rtol=1e-5, atol=1e-6)
