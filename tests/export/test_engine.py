"""Engines for SM75, the T4's, which TensorRT-RTX builds without a GPU; and what build_engine refuses."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dfine_plugin import wrap_decoder
from dfine_plugin.benchmarks.models.full_size_hosts import HOSTS
from dfine_plugin.export import build_engine, engine, export_onnx
from dfine_plugin.tools.targets import compute_capability

from ..adapters.hosts import IMAGE_SIZE, wrapped
from ..adapters.transformers_hosts import HOSTS as SMALL_HOSTS

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"),
]

SMALL = {host.name: host for host in SMALL_HOSTS}["deformable-detr-refine"]
SIZE = IMAGE_SIZE, IMAGE_SIZE


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("graphs"), wrapped(SMALL)
    return {
        "fp32": export_onnx(model, folder / "fp32.onnx", SIZE),
        "fp16": export_onnx(model, folder / "fp16.onnx", SIZE, batch_size=None, precision="fp16", num_detections=5),
    }


@pytest.mark.slow
@pytest.mark.parametrize("target", ["T4", "sm80", "sm86", "sm89", "sm120"])
def test_an_engine_for_a_device_that_is_not_here(graphs: dict[str, Path], tmp_path: Path, target: str) -> None:
    built = build_engine(graphs["fp16"], tmp_path / "new" / "model.engine", target)
    assert built.path.stat().st_size == built.num_bytes > 0
    assert (built.backend, built.target, built.precision) == ("tensorrt-rtx", compute_capability(target), "fp16")
    assert built.num_layers > 100


@pytest.mark.slow
def test_what_build_engine_refuses(graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.engine"
    with pytest.raises(ValueError, match=r"not fp16 \(one is .*FLOAT.*export it with precision fp16"):
        build_engine(graphs["fp32"], path, "sm75")
    with pytest.raises(ValueError, match="not fp32"):
        build_engine(graphs["fp16"], path, "sm75", precision="fp32")
    # the backend's own words: no float32 products on a T4
    with pytest.raises(RuntimeError, match=r"tensorrt-rtx cannot build .* for sm75: .*FP32"):
        build_engine(graphs["fp32"], path, "sm75", precision="fp32")
    with pytest.raises(ValueError, match=r"tensorrt-rtx knows .*sm75.*, not sm12345"):
        build_engine(graphs["fp16"], path, "sm12345")
    with pytest.raises(ValueError, match="target 'T3' is no compute capability such as sm75"):
        build_engine(graphs["fp16"], path, "T3")
    with pytest.raises(ValueError, match="backend must be tensorrt-rtx or tensorrt, got 'openvino'"):
        build_engine(graphs["fp16"], path, "sm75", backend="openvino")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU to build for: name a target"):
            build_engine(graphs["fp16"], path)
    if find_spec("tensorrt") is None:
        with pytest.raises(ImportError, match="tensorrt is not installed: pip install tensorrt"):
            build_engine(graphs["fp16"], path, backend="tensorrt")
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install tensorrt-rtx"):
        build_engine(graphs["fp16"], path, "sm75")
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("rt-detr-r18", 640), ("deformable-detr-r50", 320)])
def test_hosts_of_real_size_build_wrapped_and_bare(name: str, side: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    built = {}
    for kind in ("host", "wrapped"):
        model = HOSTS[name]().eval()
        if name == "deformable-detr-r50":
            del model.model.encoder.layers[1:]  # six would take a minute each, and none of them differs
        if kind == "wrapped":
            wrap_decoder(model)
        path = export_onnx(model, tmp_path / f"{kind}.onnx", (side, side), precision="fp16")
        built[kind] = build_engine(path, tmp_path / f"{kind}.engine", "sm75")
        print(f"{name}, {kind}: {built[kind].num_bytes / 2**20:.1f} MiB, {built[kind].num_layers} layers")
    # the FDR heads take the place of box heads
    assert built["wrapped"].num_bytes < 1.03 * built["host"].num_bytes
