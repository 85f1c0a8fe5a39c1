"""Metrics and images that config.log.extras asks for."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from cotnet_jax.config import names_in
from cotnet_jax.models.stages import split_by_stage

_GIB = 2**30
# Images on a side of the grid that TensorBoard shows.
_SIDE = 4


def wanted(extras: str, name: str) -> bool:
    """Return whether config.log.extras names one of its metrics, or all."""
    return bool({name, "all"}.intersection(names_in(extras)))


def gradient_norms(gradients: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return {"gradient_norm/STAGE": the global norm of a stage's gradients, float []}."""
    return {
        f"gradient_norm/{stage}": optax.global_norm(tree)
        for stage, tree in split_by_stage(gradients).items()
    }


def measured(extras: str, line: Mapping[str, float], batch_size: int) -> dict[str, float]:
    """Return what is measured on the host: step_seconds, and memory_peak_gib of the fullest device.

    Args:
      extras: config.log.extras.
      line: the metrics of a line of progress.
      batch_size: images a step.
    """
    found = {}
    if wanted(extras, "step_time") and "images_per_second" in line:
        found["step_seconds"] = batch_size / line["images_per_second"]
    if wanted(extras, "memory"):
        # CPUs tell nothing.
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
        if peaks:
            found["memory_peak_gib"] = max(peaks) / _GIB
    return found


def image_grid(images: jax.Array) -> np.ndarray:
    """Return the first images of a batch, those on this process's first device, as one picture.

    Args:
      images: uint8 [B, S, S, 3], sharded over the devices.

    Returns:
      uint8 [rows * S, 4 * S, 3], black where there are no more images.
    """
    shown = np.asarray(images.addressable_shards[0].data[: _SIDE**2])
    count, height, width, channels = shown.shape
    missing = -count % _SIDE
    shown = np.concatenate([shown, np.zeros((missing, *shown.shape[1:]), shown.dtype)])
    rows = shown.reshape(-1, _SIDE, height, width, channels).swapaxes(1, 2)
    return rows.reshape(-1, _SIDE * width, channels)
