"""Run an exported graph without torch: onnxruntime, NumPy and Pillow are all that it needs.

    pip install numpy onnxruntime pillow
    python examples/run_graph.py model.onnx photo.jpg

The graph is one that selects detections: `dfine-plugin export --model wrapped --detections 300 --output model.onnx`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


# --8<-- [start:detect]
def open_graph(path: Path) -> tuple[onnxruntime.InferenceSession, dict]:
    """The graph, and what it says of itself."""
    session = onnxruntime.InferenceSession(str(path))
    return session, {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}


def detect(session: onnxruntime.InferenceSession, about: dict, photo: Image.Image) -> list[np.ndarray]:
    """Scores (n,), labels (n,) and boxes (n, 4) as x0, y0, x1, y1 in pixels of the photo, best first."""
    height, width = about["input_size"]
    norm = about["normalisation"]
    pixels = np.asarray(photo.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    if norm["channels"] == "BGR":  # of most of detrex's hosts
        pixels = pixels[..., ::-1]
    pixels = (pixels * norm["scale"] - norm["mean"]) / norm["std"]
    images = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    sides = np.array([[photo.height, photo.width]])
    found = session.run(["scores", "labels", "boxes"], {"images": images, "target_sizes": sides})
    return [values[0] for values in found]


# --8<-- [end:detect]


def check_file(name: str) -> Path:
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"{name} is no file")
    return Path(name)


def main() -> None:
    """Print what a graph finds in a photo."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("graph", type=check_file, help="exported with --detections, for one image at a time")
    parser.add_argument("photo", type=check_file)
    parser.add_argument("--threshold", type=float, default=0.5, help="least score")
    given = parser.parse_args()

    session, about = open_graph(given.graph)
    if "normalisation" not in about or "target_sizes" not in [tensor.name for tensor in session.get_inputs()]:
        parser.error(f"{given.graph} is no graph that `dfine-plugin export --detections 300` wrote")
    with Image.open(given.photo) as photo:
        scores, labels, boxes = detect(session, about, photo)
    for score, label, box in zip(scores, labels, boxes, strict=True):
        if score >= given.threshold:
            print(about["class_names"][str(label)], f"{score:.3f}", *(f"{edge:.1f}" for edge in box))


if __name__ == "__main__":
    main()
