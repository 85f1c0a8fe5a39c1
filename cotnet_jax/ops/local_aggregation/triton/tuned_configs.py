"""Measured configurations of the kernels: one JSON file a GPU, in the folder ``tuned``.

``python -m cotnet_jax.tools.tune_kernels`` writes the file of the GPU that it runs on. A GPU
without a file uses that of the nearest one.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
from typing import NamedTuple

from cotnet_jax.ops.local_aggregation.triton.configs import CONFIG_CLASSES, Table, key_fields

FOLDER = pathlib.Path(__file__).parent / "tuned"


class Gpu(NamedTuple):
    """A GPU, as JAX describes it.

    Attributes:
      device_kind: its name, for example "NVIDIA H100 80GB HBM3".
      compute_capability: for example "9.0".
      multiprocessors: how many it has.
    """

    device_kind: str
    compute_capability: str
    multiprocessors: int

    @property
    def name(self) -> str:
        """The name of its file: "h100" for "NVIDIA H100 80GB HBM3", "rtx4090", "a100"."""
        model = re.search(r"(RTX )?[A-Z]*\d+[A-Z]*", self.device_kind)
        name = model.group() if model else self.device_kind
        return re.sub(r"\W", "", name).lower()


class TunedConfigs(NamedTuple):
    """Configurations, and the GPU that they were measured on."""

    gpu: Gpu
    table: Table


@functools.cache
def nearest(gpu: Gpu) -> TunedConfigs:
    """Return the configurations of a GPU, or those of the most similar GPU that has a file."""
    own = FOLDER / f"{gpu.name}.json"
    if own.exists():
        return read(own)

    def distance(tuned):
        generations = abs(float(tuned.gpu.compute_capability) - float(gpu.compute_capability))
        return generations, abs(math.log2(tuned.gpu.multiprocessors / gpu.multiprocessors))

    return min(map(read, sorted(FOLDER.glob("*.json"))), key=distance)


def describe(gpu: Gpu) -> str:
    """Return one line about where the configurations of a GPU come from."""
    tuned = nearest(gpu)
    line = f"kernel configs: measured on {tuned.gpu.device_kind}"
    if tuned.gpu.name == gpu.name:
        return line
    return (
        f"{line}, the nearest to {gpu.device_kind}, which has none of its own; "
        "`python -m cotnet_jax.tools.tune_kernels` measures them"
    )


@functools.cache
def read(path: pathlib.Path) -> TunedConfigs:
    """Return the configurations in a file.

    Raises:
      ValueError: the file is not one that ``write`` makes; the message says where it differs.
    """
    try:
        content = json.loads(path.read_text())
        return TunedConfigs(Gpu(**content["gpu"]), _table(content["kernels"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold kernel configurations ({error!r}); restore it, or make it "
            "again with `python -m cotnet_jax.tools.tune_kernels`"
        ) from error


def _table(kernels):
    if set(kernels) != set(CONFIG_CLASSES):
        raise ValueError(f"kernels are {sorted(kernels)}, not {sorted(CONFIG_CLASSES)}")
    table = {}
    for kernel, config_class in CONFIG_CLASSES.items():
        entry = kernels[kernel]
        fields = {f.name: f.type for f in dataclasses.fields(config_class)}
        for name, wanted in (("shape", [*key_fields(kernel)]), ("config", [*fields])):
            if entry[name] != wanted:
                raise ValueError(f"{name} of {kernel} is {entry[name]}, not {wanted}")
        table[kernel] = {}
        for shape, numbers in entry["tuned"]:
            types = [*(int for _ in entry["shape"]), *fields.values()]
            if [type(number) for number in shape + numbers] != types:
                raise ValueError(f"{kernel} has {shape}, {numbers}")
            table[kernel][tuple(shape)] = config_class(*numbers)
    return table


def write(tuned: TunedConfigs, path: pathlib.Path) -> None:
    """Write configurations to a file, one shape a line."""
    kernels = []
    for kernel, config_class in CONFIG_CLASSES.items():
        rows = [
            json.dumps([key, dataclasses.astuple(config)])
            for key, config in sorted(tuned.table[kernel].items())
        ]
        fields = [field.name for field in dataclasses.fields(config_class)]
        kernels.append(
            f'    "{kernel}": {{\n'
            f'      "shape": {json.dumps(key_fields(kernel))},\n'
            f'      "config": {json.dumps(fields)},\n'
            f'      "tuned": [\n        ' + ",\n        ".join(rows) + "\n      ]\n    }"
        )
    path.write_text(
        f'{{\n  "gpu": {json.dumps(tuned.gpu._asdict())},\n'
        '  "kernels": {\n' + ",\n".join(kernels) + "\n  }\n}\n"
    )
