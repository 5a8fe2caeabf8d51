"""A float32 graph, typed in half precision.

Newer TensorRT takes the types from the graph: it has no flag for FP16. So the graph says what runs in which precision.
"""

import ast
import re
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

PRECISIONS = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

# What a device has fast units for, and refuses in float32 (TensorRT-RTX has no float32 product for SM75).
_ALWAYS_LOW = {"Conv", "ConvTranspose", "Einsum", "Gemm", "GridSample", "MatMul"}
# What only moves values about: in the precision in which they come.
_MOVES = {
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "ScatterND", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
# Inputs that ONNX wants in float32 whatever the others are: sizes and scales.
_FLOAT32_INPUTS = {"Resize": (1, 2)}

# How a trace names the FDR head where it first meets it at a layer's gates, by the way from its norm to the decoder.
_GATED = re.compile(r"\.layers\.\d+(\.\w+)+\.decoder_of\.reference\(\)")


def to_precision(
    model: ir.Model, precision: str, decoder: str, keep_float32: Iterable[str] = (), simulate: bool = False
) -> None:
    """Type a float32 graph in lower precision, in place; its inputs and outputs stay float32.

    Float32 stay: what the FDR head, the decoder and the modules around it compute themselves, which is distributions,
    references, boxes and the selection of queries; and what does not depend on the images, such as position grids. Of
    these, matrix products and convolutions run in lower precision all the same. Everything within layers, backbone and
    heads does, LayerNormalization and Softmax in it as one op each, which accumulate in float32.

    Args:
        model: as torch's exporter writes it, each node with the names of the modules it comes from.
        precision: ``"fp16"`` or ``"bf16"``.
        decoder: the dotted name of the decoder in the exported module.
        keep_float32: dotted names of further modules, all of which stays in float32.
        simulate: compute in float32 and round what each op gives, for runtimes that lack the ops in this precision.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be fp32, {' or '.join(PRECISIONS)}, got {precision!r}")
    parts = decoder.split(".")
    # the decoder's box heads too: in detrex they refine
    containing = {".".join(parts[:i]) for i in range(len(parts) + 1)} | {f"{decoder}.fdr", f"{decoder}.bbox_embed"}
    _Typing(model.graph, PRECISIONS[precision], containing, tuple(keep_float32), simulate).run()


def module_of(node: ir.Node) -> str:
    """The dotted name of the module whose forward computes this node."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    # the last is the operation itself
    return _GATED.sub("", scopes[-2]) if len(scopes) > 1 else ""


class _Typing:
    """One pass over a graph."""

    def __init__(
        self, graph: ir.Graph, low: ir.DataType, containing: set[str], keep: tuple[str, ...], simulate: bool
    ) -> None:
        self.graph = graph
        self.low = low
        self.containing = containing
        self.keep = keep
        self.simulate = simulate
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.from_images: set[ir.Value] = set(graph.inputs)
        self.rough: set[ir.Value] = set()  # what low nodes give, where they are simulated

    def run(self) -> None:
        for node in list(self.graph):
            if node.op_type not in ("Shape", "Size") and self.from_images.intersection(filter(None, node.inputs)):
                self.from_images.update(node.outputs)
            precision = self._precision(node)
            (self._round if self.simulate else self._type)(node, precision)
        for i, output in enumerate(self.graph.outputs):
            if output.dtype == self.low or output in self.rough:
                name = output.name
                output.name = f"{name}_{self.low.name.lower()}"
                self.graph.outputs[i] = self._as_float32(output)
                self.graph.outputs[i].name = name

    def _as_float32(self, value: ir.Value) -> ir.Value:
        return (
            self._cast(self._cast(value, self.low), ir.DataType.FLOAT)
            if self.simulate
            else self._cast(value, ir.DataType.FLOAT)
        )

    def _round(self, node: ir.Node, precision: ir.DataType) -> None:
        for i, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT or i in _FLOAT32_INPUTS.get(node.op_type, ()):
                continue
            if precision == self.low or value in self.rough:
                node.replace_input_with(i, self._as_float32(value))
        if precision == self.low:
            self.rough.update(output for output in node.outputs if output.dtype == ir.DataType.FLOAT)

    def _precision(self, node: ir.Node) -> ir.DataType:
        module = module_of(node)
        if any(module == name or module.startswith(f"{name}.") for name in self.keep):
            return ir.DataType.FLOAT
        if node.op_type in _ALWAYS_LOW:
            return self.low
        if not self.from_images.intersection(node.outputs):
            return ir.DataType.FLOAT
        if node.op_type in _MOVES:
            moved = {value.dtype for value in filter(None, node.inputs) if value in self.from_images}
            return ir.DataType.FLOAT if ir.DataType.FLOAT in moved else self.low
        return ir.DataType.FLOAT if re.sub(r"\.\d+$", "", module) in self.containing else self.low

    def _type(self, node: ir.Node, precision: ir.DataType) -> None:
        for i, value in enumerate(node.inputs):
            if value is None or value.dtype not in (ir.DataType.FLOAT, self.low):
                continue
            wanted = ir.DataType.FLOAT if i in _FLOAT32_INPUTS.get(node.op_type, ()) else precision
            if value.dtype != wanted:
                node.replace_input_with(i, self._cast(value, wanted))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", precision)
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.dtype = precision

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """The value in another precision: cast once, where it comes from."""
        if (value, to) not in self.casts:
            if value.is_initializer():
                self.casts[value, to] = self._convert(value, to)
            else:
                cast = ir.node("Cast", [value], {"to": to}, name=f"{value.name}_to_{to.name.lower()}")
                (output,) = cast.outputs
                output.name, output.shape, output.dtype = cast.name, value.shape, to
                producer = value.producer()
                if producer is None:
                    self.graph.insert_before(self.graph[0], cast)
                else:
                    self.graph.insert_after(producer, cast)
                self.casts[value, to] = output
        return self.casts[value, to]

    def _convert(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        assert value.const_value is not None
        largest = float(ir_finfo(to).max)
        # what a mask hides with float32's lowest number stays finite
        array = np.clip(value.const_value.numpy(), -largest, largest).astype(to.numpy())
        name = f"{value.name}_{to.name.lower()}"
        converted = ir.Value(
            name=name, shape=value.shape, type=ir.TensorType(to), const_value=ir.tensor(array, name=name)
        )
        self.graph.register_initializer(converted)
        return converted


def ir_finfo(dtype: ir.DataType):
    """numpy's finfo of an ONNX type, bfloat16 included."""
    import ml_dtypes

    return ml_dtypes.finfo(dtype.numpy())
