"""An ONNX graph under construction."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx

# The first operator set whose Resize can filter as Pillow does; ONNX Runtime has it since 1.14.
OPSET = 18
# Of the same release of ONNX.
IR_VERSION = 8


class Features(NamedTuple):
    """A tensor [N, channels, size, size] of the graph.

    Attributes:
      name: of the tensor.
      channels: their number.
      size: rows, and columns.
    """

    name: str
    channels: int
    size: int


class Graph:
    """Nodes and constants, added in the order of computation.

    A node, its result and its constants have the name of the layer that they belong to, with the
    scopes around it: ``stage1_block0/cot/key_conv``, ``stage1_block0/cot/key_conv/kernel``.
    """

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._names: set[str] = set()
        self._scopes: list[str] = []

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put a name in front of those that are added inside."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def add(
        self,
        operator: str,
        name: str,
        inputs: Sequence[str],
        constants: Mapping[str, np.ndarray] | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node with one result, and return the result's name.

        Args:
          operator: of ONNX.
          name: of the node; a second one of the same name is numbered.
          inputs: names of its inputs, "" for one that is left out.
          constants: further inputs by name, in the order of the operator's inputs. Floats are
            stored in float32.
          **attributes: of the operator.
        """
        name = self._new_name(name)
        inputs = [*inputs]
        for part, array in (constants or {}).items():
            inputs.append(f"{name}/{part}")
            self._constants.append(_tensor(array, inputs[-1]))
        self.nodes.append(onnx.helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        metadata: Mapping[str, str],
        name: str,
        version: str,
    ) -> onnx.ModelProto:
        """Return the finished model, checked by ONNX."""
        graph = onnx.helper.make_graph(self.nodes, name, inputs, outputs, self._constants)
        model = onnx.helper.make_model(
            graph,
            producer_name="cotnet_jax",
            producer_version=version,
            ir_version=IR_VERSION,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        )
        onnx.helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model

    def _new_name(self, name):
        name = first = "/".join([*self._scopes, name])
        number = 2
        while name in self._names:
            name = f"{first}_{number}"
            number += 1
        self._names.add(name)
        return name


def _tensor(array, name):
    array = np.asarray(array)
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32)
    return onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
