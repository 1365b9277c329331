"""The resize that is the same on any device is PyTorch's on a CPU, bit for bit."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from shards.resize import resize

SIDES = st.integers(min_value=8, max_value=300)


@settings(max_examples=150, deadline=None)
@given(height=SIDES, width=SIDES, to_height=SIDES, to_width=SIDES, is_last=st.booleans(), seed=st.integers(0, 1000))
def test_every_pixel_is_pytorchs(
    height: int, width: int, to_height: int, to_width: int, is_last: bool, seed: int
) -> None:
    shape, draws = (2, 3, height, width), torch.Generator().manual_seed(seed)
    frames_TCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draws)
    if is_last:
        frames_TCHW = frames_TCHW.contiguous(memory_format=torch.channels_last)
    expected = F.interpolate(frames_TCHW, size=(to_height, to_width), mode="bilinear", antialias=True)
    assert torch.equal(resize(frames_TCHW, to_height, to_width), expected)
