"""The aggregations in NumPy, from their definitions, for tests and for checks on a GPU.

All take and return float64 arrays, operands in the order of ``triton.launch``.
"""

import math

import numpy as np

Arrays = tuple[np.ndarray, ...]


def loops(values: np.ndarray, weights: np.ndarray, gradient: np.ndarray) -> Arrays:
    """Return what ``local_aggregation`` returns, one product at a time: for small arrays."""
    groups, taps, weight_channels = weights.shape[3:]
    size = math.isqrt(taps)
    channels = values.shape[3] // groups
    output, dvalues, dweights = (np.zeros_like(a) for a in (values, values, weights))
    for n, h, v in np.ndindex(values.shape[:3]):
        for i, j in np.ndindex(size, size):
            row, column = h + i - size // 2, v + j - size // 2
            if not (0 <= row < values.shape[1] and 0 <= column < values.shape[2]):
                continue
            for group, c in np.ndindex(groups, channels):
                channel, at = group * channels + c, (n, h, v, group, i * size + j)
                weight = weights[at][c % weight_channels]
                output[n, h, v, channel] += weight * values[n, row, column, channel]
                dvalues[n, row, column, channel] += weight * gradient[n, h, v, channel]
                dweights[at][c % weight_channels] += (
                    gradient[n, h, v, channel] * values[n, row, column, channel]
                )
    return output, dvalues, dweights


def local_aggregation(values: np.ndarray, weights: np.ndarray, gradient: np.ndarray) -> Arrays:
    """Return the aggregation, and the gradients of values and weights.

    Args:
      values, gradient: [N, H, W, C]; ``gradient`` is that of the result.
      weights: [N, H, W, G, K*K, Cw].
    """
    n, h, w, groups, taps, channels = weights.shape
    size = math.isqrt(taps)
    half = size // 2
    shape = values.shape
    values, gradient = (a.reshape(n, h, w, groups, -1, channels) for a in (values, gradient))
    padded = np.pad(values, [(0, 0), (half, half), (half, half), (0, 0), (0, 0), (0, 0)])
    output, padded_gradient = np.zeros_like(values), np.zeros_like(padded)
    weights_gradient = np.zeros_like(weights)
    for tap in range(taps):
        i, j = divmod(tap, size)
        window = padded[:, i : i + h, j : j + w]
        weight = weights[..., tap, None, :]
        output += weight * window
        padded_gradient[:, i : i + h, j : j + w] += weight * gradient
        weights_gradient[..., tap, :] = (gradient * window).sum(4)
    values_gradient = padded_gradient[:, half : half + h, half : half + w]
    return output.reshape(shape), values_gradient.reshape(shape), weights_gradient


def normalized_local_aggregation(
    values: np.ndarray,
    raw_weights: np.ndarray,
    gradient: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    *output_affine: np.ndarray,
    epsilon: float = 1e-5,
) -> Arrays:
    """Return the aggregation with group-normalised weights, and the gradients of all operands.

    Args:
      values, gradient: [N, H, W, C].
      raw_weights: [N, H, W, G, K*K, Cw].
      scale, bias: [G, K*K, Cw].
      output_affine: none, or the scale and the shift [C] of the epilogue with SiLU.
      epsilon: added to the variance.

    Returns:
      The result, then gradients of values, raw weights, scale, bias, and output scale and shift if
      these are given.
    """
    axes = (1, 2, 4)
    mean = raw_weights.mean(axes, keepdims=True)
    rstd = 1 / np.sqrt(raw_weights.var(axes, keepdims=True) + epsilon)
    normal = (raw_weights - mean) * rstd
    output_gradients = ()
    if output_affine:
        y = local_aggregation(values, normal * scale + bias, gradient)[0]
        z = output_affine[0] * y + output_affine[1]
        sigmoid = 1 / (1 + np.exp(-z))
        dz = gradient * sigmoid * (1 + z * (1 - sigmoid))
        output_gradients = ((dz * y).sum((0, 1, 2)), dz.sum((0, 1, 2)))
        gradient = dz * output_affine[0]
    output, values_gradient, dw = local_aggregation(values, normal * scale + bias, gradient)
    if output_affine:
        output = z * sigmoid
    scale_gradient, bias_gradient = (dw * normal).sum((0, 1, 2)), dw.sum((0, 1, 2))
    dn = dw * scale
    dn -= dn.mean(axes, keepdims=True) + normal * (dn * normal).mean(axes, keepdims=True)
    gradients = (values_gradient, dn * rstd, scale_gradient, bias_gradient)
    return output, *gradients, *output_gradients
