"""Classifies images with an exported model: NumPy and ONNX Runtime alone.

python examples/serve_onnx.py MODEL.onnx IMAGES.npy
"""

import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(
  sys.argv[1], providers=['CPUExecutionProvider']
)
images = np.load(sys.argv[2]).astype(np.float32)  # [N, H, W, C]
(logits,) = session.run(['logits'], {'images': images})
print(*logits.argmax(-1))
