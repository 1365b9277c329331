"""A clip's frames from their JPEGs to their places in a batch, without the interpreter between them.

Threads that read share one interpreter with each other and with whoever trains. Called from Python, the operators of a
clip's frames take it and wait for it a hundred times; compiled by TorchScript the same function takes it once.
"""

import inspect
import warnings
from collections.abc import Callable

import torch
import torchvision.io  # pyright: ignore[reportUnusedImport]  # noqa: F401  registers torch.ops.image
from torch import Tensor

_RGB = 3  # torchvision.io.ImageReadMode.RGB


def _decode_window(
    jpegs: Tensor, lengths: list[int], top: int, left: int, height: int, width: int, flip: bool, out_TCSS: Tensor
) -> None:
    """Writes the same window of every frame, resized as `crop_clip` does it and mirrored if it is to be flipped.

    `jpegs` are bytes, one JPEG after the other, `lengths` those of each. RuntimeError if one is no JPEG.
    """
    size = out_TCSS.size(-1)
    for frame, jpeg in enumerate(jpegs.split(lengths)):
        image_CHW = torch.ops.image.decode_jpeg(jpeg, 3)
        # One operator cuts the window out of the decoder's layout, channels last, which PyTorch resizes three times as
        # fast and would not see in image_CHW[None].
        of_colour, of_row, of_pixel = image_CHW.stride(0), image_CHW.stride(1), image_CHW.stride(2)
        window_1CHW = image_CHW.as_strided(
            [1, 3, height, width],
            [image_CHW.numel(), of_colour, of_row, of_pixel],
            top * of_row + left * of_pixel,
        )
        out_1CSS = out_TCSS.narrow(0, frame, 1)
        if height == size and width == size:
            out_1CSS.copy_(window_1CHW.flip([-1]) if flip else window_1CHW)
        elif flip:
            resized_1CSS = torch.ops.aten._upsample_bilinear2d_aa(window_1CHW, [size, size], False, None, None)
            out_1CSS.copy_(resized_1CSS.flip([-1]))
        else:  # what F.interpolate calls, with a place for the result: a twentieth of reading a clip
            torch.ops.aten._upsample_bilinear2d_aa(window_1CHW, [size, size], False, None, None, out=out_1CSS)


def _compiled() -> Callable[[Tensor, list[int], int, int, int, int, bool, Tensor], None]:
    with warnings.catch_warnings():  # of TorchScript's end; the newest Python and PyTorch that we allow have it
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.script(inspect.unwrap(_decode_window))


# At import, not by the first threads to read: where two parse at once, Python below 3.11.8 may raise SystemError.
decode_window = _compiled()
