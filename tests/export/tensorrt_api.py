"""The part of TensorRT's Python API that the plugin calls, written out as its bindings' docstrings state it.

    python -m tests.export.tensorrt_api tensorrt > tests/export/tensorrt_11.txt

The bindings import without a GPU. One line for each class that is another's subclass, each overload of a method, each
property (its type, and whether it can be set) and each member of an enum.
"""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

CALLED = """
    NetworkDefinitionCreationFlag.STRONGLY_TYPED
    DataType.FLOAT DataType.HALF DataType.BF16 DataType.INT32 DataType.INT64
    TensorIOMode.INPUT TensorIOMode.OUTPUT
    ComputeCapability.SM75
    ILogger.Severity.ERROR ILogger.Severity.WARNING ILogger.__init__ ILogger.log
    Logger.__init__
    Builder.__init__ Builder.create_network Builder.create_builder_config Builder.create_optimization_profile
    Builder.build_serialized_network
    INetworkDefinition.num_inputs INetworkDefinition.get_input INetworkDefinition.num_layers
    ITensor.name ITensor.shape
    IOptimizationProfile.set_shape
    IBuilderConfig.add_optimization_profile IBuilderConfig.num_compute_capabilities
    IBuilderConfig.set_compute_capability
    OnnxParser.__init__ OnnxParser.parse_from_file OnnxParser.num_errors OnnxParser.get_error
    ParserError.desc
    IHostMemory.nbytes
    Runtime.__init__ Runtime.deserialize_cuda_engine
    ICudaEngine.num_io_tensors ICudaEngine.get_tensor_name ICudaEngine.get_tensor_mode ICudaEngine.get_tensor_shape
    ICudaEngine.get_tensor_dtype ICudaEngine.create_execution_context
    IExecutionContext.set_input_shape IExecutionContext.get_tensor_shape IExecutionContext.set_tensor_address
    IExecutionContext.execute_async_v3
"""


def lines(module: ModuleType) -> Iterator[str]:
    """The table of an installed TensorRT; what that has not is left out."""
    yield f"__version__ = {module.__version__!r}"
    yield f"class Logger({module.Logger.__base__.__name__})"
    for name in CALLED.split():
        *path, last = name.split(".")
        owner = module
        for part in path:
            owner = getattr(owner, part, None)
        member = getattr(owner, last, None)
        if isinstance(member, property):
            result = _python_types(member.fget.__doc__.rpartition(" -> ")[2])
            yield f"{name}: {result}{' (can be set)' if member.fset else ''}"
        elif callable(member):
            # "1. name(self: Kind, ...) -> Kind" where there are several, without the number where there is one
            signatures = re.findall(rf"^(?:\d+\. )?{last}(\(self: .* -> .*)$", member.__doc__, re.MULTILINE)
            yield from (f"{name}{_python_types(signature)}" for signature in signatures)
        elif member is not None:
            yield f"{name} = {int(member)}"


def _python_types(text: str) -> str:
    """Types as Python code names them, without modules; defaults as dots."""
    text = re.sub(r"\(self: [\w.]+", "(self", text.strip())
    text = re.sub(r"= [^,)]+", "= ...", text).replace("nvonnxparser::IParserError", "ParserError")
    text = text.replace("typing.SupportsInt", "int")
    return re.sub(r"\b(?:tensorrt\w*_bindings\.\w+|typing_extensions|collections\.abc)\.", "", text)


if __name__ == "__main__":
    print("\n".join(lines(import_module(sys.argv[1]))))
