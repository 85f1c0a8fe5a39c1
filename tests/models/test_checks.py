"""Each mistake at a model's door is one sentence with what to type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import cotnet_jax


@pytest.fixture(scope="module")
def tiny():
    """A model of RGB images, and the shapes of its variables."""
    model = cotnet_jax.create_model("cotnet_tiny", num_classes=10)
    return model, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def pixels(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (
            pixels(2, 3, 32, 32),
            ValueError,
            "with 3 channels, as the model's weights are for, not (2, 3, 32, 32): these look like "
            "[N, channels, H, W], type images.transpose(0, 2, 3, 1)",
        ),
        (
            pixels(2, 32, 32, 3, dtype=jnp.uint8),
            TypeError,
            "floats, not uint8: type cotnet_jax.data.normalize.normalize(images, model.default_cfg["
            "'mean'], model.default_cfg['std'], model.dtype) for pixels of 0..255",
        ),
        (
            pixels(2, 32, 32, 1),
            ValueError,
            "not (2, 32, 32, 1): type images.repeat(3, axis=-1), or adapt the weights by "
            "cotnet_jax.load(PATH, in_channels=1)",
        ),
        (
            pixels(2, 32, 32, 4),
            ValueError,
            "not (2, 32, 32, 4): type images[..., :3] to leave out the last channel, such as "
            "alpha, or adapt the weights by cotnet_jax.load(PATH, in_channels=4)",
        ),
        (
            pixels(2, 32, 32, 7),
            ValueError,
            "not (2, 32, 32, 7): adapt the weights by cotnet_jax.load(PATH, in_channels=7)",
        ),
        (pixels(32, 32, 3), ValueError, "not (32, 32, 3): type images[None] for a single image"),
        (pixels(32, 32), ValueError, "not (32, 32)"),
        (Image.new("RGB", (32, 32)), TypeError, "an array, not Image: type numpy.asarray(images)"),
        ([[[[1.0]]]], TypeError, "an array, not list: type numpy.asarray(images)"),
    ],
)
def test_images(tiny, images, error, message, unchecked_shapes):
    model, variables = tiny
    with pytest.raises(error) as raised:
        jax.eval_shape(lambda variables: model.apply(variables, images), variables)
    text = str(raised.value)
    assert text.startswith("images must be [N, H, W, channels]")
    assert text.endswith(message)
    assert "\n" not in text


def test_what_a_hint_says_works(tiny):
    """The function that is named for uint8 images is there, and gives what the model takes."""
    from cotnet_jax.data.normalize import normalize

    model, variables = tiny
    images = np.zeros((2, 32, 32, 3), np.uint8)
    cfg = model.default_cfg
    floats = normalize(images, cfg["mean"], cfg["std"], model.dtype)
    assert jax.eval_shape(model.apply, variables, floats).shape == (2, 10)


def test_images_whose_channels_come_first_are_noticed_at_initialisation(unchecked_shapes):
    model = cotnet_jax.create_model("cotnet_tiny")
    images = pixels(2, 3, 32, 48)
    with pytest.raises(ValueError, match=r"looks like \[N, channels, H, W\]: type images.transp"):
        jax.eval_shape(model.init, jax.random.key(0), images)
    # Where they are meant, it is said.
    sure = cotnet_jax.create_model("cotnet_tiny", in_channels=48)
    variables = jax.eval_shape(sure.init, jax.random.key(0), images)
    assert variables["params"]["stem"]["conv1"]["kernel"].shape[2] == 48


def test_in_channels_is_checked_at_initialisation(unchecked_shapes):
    model = cotnet_jax.create_model("cotnet_tiny", in_channels=1)
    with pytest.raises(ValueError, match=r"with 1 channel, .*: type images.mean\(axis=-1, keep"):
        jax.eval_shape(model.init, jax.random.key(0), pixels(2, 32, 32, 3))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"dtype": "bf16"}, "dtype must be a floating-point type such as jnp.bfloat16"),
        ({"dtype": jnp.int8}, "dtype must be a floating-point type"),
        ({"param_dtype": None}, "param_dtype must be a floating-point type"),
        ({"implementation": "cuda"}, "implementation must be 'xla', 'triton' or None, not 'cuda'"),
        ({"out_indices": (4, 1)}, "must be some of (0, 1, 2, 3, 4), in ascending order"),
        ({"out_indices": (1, 5)}, "out_indices must be some of"),
        ({"out_indices": 4}, "out_indices must be some of"),
        ({"out_indices": ()}, "out_indices must be some of"),
        ({"out_indices": (1, 2)}, "out_indices are for features_only=True"),
        ({"in_channels": 0}, "in_channels must be 1 or more, or None, not 0"),
        ({"num_classes": "10"}, "num_classes must be 0 or more, not '10'"),
    ],
)
def test_values_of_attributes(attributes, message, unchecked_shapes):
    with pytest.raises(ValueError) as raised:
        cotnet_jax.create_model("cotnet50", **attributes)
    assert str(raised.value).startswith("create_model('cotnet50'): ")
    assert message in str(raised.value)


def test_dtypes_that_are_good():
    for dtype in (jnp.bfloat16, "bfloat16", np.float32, jnp.dtype("float16"), jnp.float64):
        cotnet_jax.create_model("cotnet50", dtype=dtype)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("num_class", "there is no argument num_class, did you mean num_classes?"),
        ("in_chans", "there is no argument in_chans, it is called in_channels here"),
        ("pretrained", "there is no argument pretrained, cotnet_jax.load(PATH) reads weights"),
        ("zebra", "there is no argument zebra; arguments are num_classes, features_only, "),
    ],
)
def test_unknown_attributes(attribute, message):
    with pytest.raises(TypeError) as raised:
        cotnet_jax.create_model("cotnet50", **{attribute: 1})
    assert message in str(raised.value)


@pytest.mark.parametrize(("size", "odd"), [(4, 5), (2, 3), (0, 1), (-1, 1)])
def test_a_kernel_without_a_middle(size, odd):
    message = f"kernel_size={size} has no middle .*: type an odd one such as kernel_size={odd}"
    with pytest.raises(ValueError, match=message):
        cotnet_jax.CoTLayer(kernel_size=size)


def test_a_layers_implementation():
    with pytest.raises(ValueError, match="must be 'xla', 'triton' or None, not 'cuda'"):
        cotnet_jax.CoTLayer(implementation="cuda")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (pixels(4, 4, 16), ValueError, r"not \(4, 4, 16\): type x\[None\] for a single image"),
        (pixels(1, 4, 4, 16, dtype=jnp.int32), TypeError, r"not int32: type x.astype\(jnp.float3"),
        ([1.0], TypeError, r"an array, not list: type numpy.asarray\(x\)"),
    ],
)
def test_a_layers_input(x, error, message, unchecked_shapes):
    with pytest.raises(error, match=message):
        cotnet_jax.CoTLayer().init(jax.random.key(0), x)
