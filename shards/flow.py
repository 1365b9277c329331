"""Dense optical flow (DIS, Kroeger et al. 2016): the door to OpenCV."""

from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

_SMALLEST = 32  # pixels: in less, DIS looks for its patches outside of a narrow frame, and the process ends


def dense_flow(before_HW: UInt8[np.ndarray, "H W"], after_HW: UInt8[np.ndarray, "H W"]) -> Float32[np.ndarray, "H W 2"]:
    """Pixels to the right and down that each pixel of a grey frame moves."""
    cv2 = opencv()
    height, width = before_HW.shape
    missing = [max(0, _SMALLEST - side) for side in (height, width)]
    padded = [
        cv2.copyMakeBorder(grey, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE) for grey in (before_HW, after_HW)
    ]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return dis.calc(padded[0], padded[1], None)[:height, :width]


def opencv() -> Any:
    """OpenCV, on one thread: DIS shares a frame out by threads, and their number would change the flow."""
    import cv2

    cv2.setNumThreads(1)
    return cv2
