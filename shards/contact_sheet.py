"""One picture of all rendered actions: a strip of frames for each, its name above, pairs side by side."""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from shards.scenes import PAIRS, render_clip

_NUM_FRAMES = 5


def contact_sheet(seed: int) -> bytes:
    """A PNG file: frames of one video of each action, from first to last."""
    figure = Figure(figsize=(8.6, 3.4), dpi=100, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(PAIRS), 2)
    for number, pair in enumerate(PAIRS):
        for column, action in enumerate(pair):
            cell = axes[number, column]
            cell.imshow(_strip(render_clip(action, [seed, number, column])))
            cell.set_title(action, fontsize=9, loc="left", pad=2)
            cell.axis("off")
    canvas.draw()
    picture_HWC = np.asarray(canvas.buffer_rgba())[..., :3]
    file = io.BytesIO()
    # Fewer shades, smaller file: 0, 17, 34 ... 255.
    imsave(file, (picture_HWC / 17).round().astype(np.uint8) * np.uint8(17), format="png")
    return file.getvalue()


def _strip(frames_THWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Some frames side by side with a white gap."""
    times = np.linspace(0, len(frames_THWC) - 1, _NUM_FRAMES).round().astype(int)
    framed_THWC = np.pad(frames_THWC[times], ((0, 0), (0, 0), (0, 6), (0, 0)), constant_values=255)
    return np.concatenate(list(framed_THWC), axis=1)[:, :-6]
