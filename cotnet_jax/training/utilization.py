"""Model FLOPs utilization (MFU): what a step has to compute, by what the devices could at best."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from cotnet_jax.models import parameter_names
from cotnet_jax.training.setup import TrainSetup

# FLOP/s of dense matrix products in bfloat16, by JAX's device_kind. NVIDIA: the data sheets of
# A100, H100, H200 and L4, whose figures "with sparsity" are twice these. TPUs, for each chip:
# https://cloud.google.com/tpu/docs/v4, and v5e, v5p and v6e.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
# A batch norm needs two.
_IMAGES = 2


class Utilization:
    """Measure a run's MFU.

    Where a device's peak is not known there is none, and one line says so.

    Args:
      setup: what the run's configuration resolves to.
    """

    def __init__(self, setup: TrainSetup):
        self._setup = setup
        self._flops: dict[bool, float] = {}
        kinds = [device.device_kind for device in setup.mesh.devices.flat]
        unknown = sorted(set(kinds) - set(PEAKS))
        self._peak = 0.0 if unknown else sum(PEAKS[kind] for kind in kinds)
        if unknown:
            logging.info("No MFU is logged: the peak of %s is not known.", ", ".join(unknown))

    def measured(self, step: int, line: Mapping[str, float]) -> dict[str, float]:
        """Return {"mfu": 0..1}, or {} where it is not known.

        Args:
          step: steps done.
          line: the metrics of a line of progress.
        """
        if not self._peak or "images_per_second" not in line:
            return {}
        head_only = step <= self._setup.head_only_steps
        if head_only not in self._flops:
            self._flops[head_only] = flops_per_image(self._setup, head_only=head_only)
        return {"mfu": line["images_per_second"] * self._flops[head_only] / self._peak}


def flops_per_image(setup: TrainSetup, *, head_only: bool = False) -> float:
    """Return the FLOPs of convolutions and matrix products in training with an image.

    They are those of the forward pass and of what the backward pass needs for the parameters that
    are trained, whatever kernels compute them; the network is only traced.

    Args:
      head_only: count the phase in which only the head is trained.
    """
    model = setup.model.clone(implementation="xla", bn_axis_name=None)
    groups = setup.head_groups if head_only else setup.groups
    variables = setup.variable_shapes
    trained, constant = parameter_names.split(variables["params"], groups.frozen)
    _, image = jax.eval_shape(lambda: setup.init_arguments)
    images = jax.ShapeDtypeStruct((_IMAGES, *image.shape[1:]), model.dtype)

    def loss(trained, constant, batch_stats, images):
        logits, _ = model.apply(
            {"params": parameter_names.join(trained, constant), "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return jnp.sum(logits)

    traced = jax.jit(jax.grad(loss)).trace(trained, constant, variables["batch_stats"], images)
    return 2 * count_products(traced.jaxpr.jaxpr) / _IMAGES


def count_products(jaxpr: Any) -> float:
    """Return the multiply-accumulates of the convolutions and matrix products in a ``Jaxpr``.

    Of branches for platforms the first, the CPU's, is taken.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "conv_general_dilated":
            kernel, output = equation.invars[1].aval, equation.outvars[0].aval
            channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            # Zeros that a stride's gradient puts between the pixels are no work to be done.
            zeros = math.prod(params["lhs_dilation"])
            total += output.size * kernel.size / channels / zeros
        elif equation.primitive.name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(shape[axis] for axis in summed)
        elif equation.primitive.name == "cond":
            total += count_products(params["branches"][0].jaxpr)
        else:
            inner = [getattr(value, "jaxpr", value) for value in params.values()]
            total += sum(count_products(each) for each in inner if hasattr(each, "eqns"))
    return total
