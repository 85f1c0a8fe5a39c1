"""Operations that map each value of a channel to another one: tables of 256 entries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cotnet_jax.data.randaugment import OP_NAMES
from cotnet_jax.training.randaugment.blends import blend, to_grey
from cotnet_jax.training.randaugment.draw import Operations, is_any_of
from cotnet_jax.training.randaugment.selected import replace_selected

_OF_HISTOGRAM = ("AutoContrast", "Equalize")
_OF_VALUE = ("Invert", "Posterize", "Solarize", "SolarizeAdd", "Contrast", "Brightness")
NAMES = (*_OF_HISTOGRAM, *_OF_VALUE)
_VALUES = np.arange(256)


def apply(images: jax.Array, operations: Operations) -> jax.Array:
    """Apply operations of ``NAMES``, and no others; images and result uint8 [B, H, W, 3]."""
    of_value = _tables_of_value(images, operations)[:, None]
    tables = replace_selected(
        jnp.broadcast_to(of_value, (len(images), 3, 256)),
        is_any_of(operations, _OF_HISTOGRAM),
        _tables_of_histogram,
        (images, operations),
    )
    return replace_selected(images, is_any_of(operations, NAMES), _look_up, (images, tables))


def _look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Return each channel's values in its own table, uint8 [B, 3, 256]."""
    places = images.astype(jnp.int32) + 256 * jnp.arange(3)
    return jax.vmap(
        lambda table, places: table.reshape(-1).at[places].get(mode="promise_in_bounds")
    )(tables, places)


def _tables_of_value(images: jax.Array, operations: Operations) -> jax.Array:
    """Return the tables of operations whose tables depend on a number, uint8 [B, 256]."""
    number = operations.value.astype(jnp.int32)[:, None]
    # Brightness and Contrast blend with black and with the mean grey: the same for all pixels.
    is_contrast = is_any_of(operations, ("Contrast",))
    degenerate = jnp.where(is_contrast, _mean_grey(images), 0)[:, None]
    blended = blend(degenerate, jnp.asarray(_VALUES), operations.value[:, None])
    forms: dict[str, jax.Array] = {
        "Invert": jnp.asarray(255 - _VALUES),
        "Posterize": jnp.asarray(_VALUES) & ~(0xFF >> number),
        "Solarize": jnp.where(number > _VALUES, _VALUES, 255 - _VALUES),
        "SolarizeAdd": jnp.where(_VALUES < 128, jnp.minimum(_VALUES + number, 255), _VALUES),
        "Contrast": blended,
        "Brightness": blended,
    }
    tables = jnp.zeros((len(images), 256), jnp.uint8)
    for name, form in forms.items():
        chosen = is_any_of(operations, (name,))[:, None]
        tables = jnp.where(chosen, form.astype(jnp.uint8), tables)
    return tables


def _mean_grey(images: jax.Array) -> jax.Array:
    """Return the mean of the grey image, rounded half up, int32 [B]."""
    grey = to_grey(images)
    count = grey[0].size
    return (2 * grey.sum(axis=(1, 2)) + count) // (2 * count)


def _tables_of_histogram(images: jax.Array, operations: Operations) -> jax.Array:
    """Return the tables of AutoContrast and Equalize, uint8 [B, 3, 256]."""
    histogram = _histograms(images)
    is_equalize = operations.op == OP_NAMES.index("Equalize")
    return jnp.where(
        is_equalize[:, None, None], _equalize_tables(histogram), _autocontrast_tables(histogram)
    )


def _histograms(images: jax.Array) -> jax.Array:
    """Count the values of each channel, int32 [B, 3, 256], of uint8 [B, H, W, 3].

    A product of the matrices of high and of low halves: scattered additions to 256 places would
    wait for each other. Counts below 2^24 are exact in float32.
    """
    high, low = (
        jax.nn.one_hot(half, 16, dtype=jnp.bfloat16) for half in (images >> 4, images & 15)
    )
    counts = jnp.einsum("nhwca,nhwcb->ncab", high, low, preferred_element_type=jnp.float32)
    return counts.astype(jnp.int32).reshape(len(images), 3, 256)


def _equalize_tables(histogram: jax.Array) -> jax.Array:
    """Return the tables of Pillow's ImageOps.equalize for histograms [..., 256]."""
    last = jnp.max(jnp.where(histogram > 0, _VALUES, 0), axis=-1, keepdims=True)
    at_last = jnp.take_along_axis(histogram, last, axis=-1)
    step = (histogram.sum(axis=-1, keepdims=True) - at_last) // 255
    before = jnp.cumsum(histogram, axis=-1) - histogram
    table = (step // 2 + before) // jnp.maximum(step, 1)
    # A single value has step 0, too.
    return jnp.where(step > 0, jnp.minimum(table, 255), _VALUES).astype(jnp.uint8)


def _autocontrast_tables(histogram: jax.Array) -> jax.Array:
    """Return the tables of Pillow's ImageOps.autocontrast for histograms [..., 256]."""
    low = jnp.min(jnp.where(histogram > 0, _VALUES, 255), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(histogram > 0, _VALUES, 0), axis=-1, keepdims=True)
    span = jnp.maximum(high - low, 1)
    scaled = 255 * (_VALUES - low)
    # Where the division leaves no remainder, the host's may come out a little lower and be cut.
    multiples = jnp.asarray(np.gcd(255, np.arange(256)))[span]
    multiple = ((_VALUES - low) * multiples // span).clip(0, 31)
    is_cut = jnp.asarray(_cut_multiples())[low, high] >> multiple.astype(jnp.uint32) & 1
    cut = jnp.where(scaled % span == 0, is_cut.astype(jnp.int32), 0)
    table = jnp.clip(scaled // span - cut, 0, 255)
    return jnp.where(high > low, table, _VALUES).astype(jnp.uint8)


@functools.cache
def _cut_multiples() -> np.ndarray:
    """Where Pillow's double precision gives a whole number less one, as bits: uint32 [256, 256].

    Between low and high, ``255 * (value - low) / (high - low)`` is whole at gcd(255, high - low)
    multiples. Bit n of entry [low, high] says that Pillow cuts the n-th of them to the number
    below. No entry has bits above 31.
    """
    bits = np.zeros((256, 256), np.uint32)
    for low in range(256):
        for high in range(low + 1, 256):
            span = high - low
            multiples = np.arange(np.gcd(255, span) + 1)
            values = low + multiples * (span // np.gcd(255, span))
            scale = 255.0 / span
            cut = (values * scale + -low * scale).astype(int) < 255 * (values - low) // span
            bits[low, high] = sum(1 << int(multiple) for multiple in multiples[cut])
    return bits
