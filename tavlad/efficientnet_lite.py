"""The parts of EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excite, with ReLU6, and with a stem and a head
whose widths never scale (Tan & Le 2019; the "Lite" variants of the TensorFlow TPU models).

Module names are those of the published PyTorch weight file, hence the leading underscores.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

STEM_WIDTH = 32
HEAD_WIDTH = 1280

# One row a stage: blocks, kernel, stride of the first block, expansion, output channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution without bias and with TensorFlow's "same" padding: ceil(size / stride) places come out, and where
    the padding is odd the extra row and column stand at the bottom and the right."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
        std = (2.0 / (kernel * kernel * out_channels // groups)) ** 0.5  # fan out, per group
        nn.init.normal_(self.weight, std=std)

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:  # noqa: A002
        top, bottom = self._padding(input.shape[-2])
        left, right = self._padding(input.shape[-1])
        x = input
        if (top, left) != (bottom, right):
            x, top, left = functional.pad(input, (left, right, top, bottom)), 0, 0  # a copy: only where it must be
        return functional.conv2d(x, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups)

    def _padding(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        num_outputs = -(-size // stride)
        total = max((num_outputs - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with the constants the published weights were trained with."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class MBConvBlock(nn.Module):
    """Expand 1x1, depthwise k x k, project 1x1; the input is added where shape allows."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self._expands = expansion != 1
        if self._expands:
            self._expand_conv = SameConv2d(in_channels, width, 1)
            self._bn0 = batch_norm(width)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width)
        self._bn1 = batch_norm(width)
        self._project_conv = SameConv2d(width, out_channels, 1)
        self._bn2 = batch_norm(out_channels)
        self._adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = x_BCHW
        if self._expands:
            x = functional.relu6(self._bn0(self._expand_conv(x)), inplace=True)
        x = functional.relu6(self._bn1(self._depthwise_conv(x)), inplace=True)
        x = self._bn2(self._project_conv(x))
        return x + x_BCHW if self._adds_input else x


def build_blocks() -> nn.ModuleList:
    """The sixteen blocks between stem and head, with random weights."""
    blocks: list[nn.Module] = []
    in_channels = STEM_WIDTH
    for num_blocks, kernel, stride, expansion, out_channels in _STAGES:
        for position in range(num_blocks):
            blocks.append(MBConvBlock(in_channels, out_channels, kernel, stride if position == 0 else 1, expansion))
            in_channels = out_channels
    return nn.ModuleList(blocks)


def build_classifier() -> nn.Linear:
    """The 1000-class layer, with random weights."""
    classifier = nn.Linear(HEAD_WIDTH, 1000)
    with torch.no_grad():
        classifier.bias.zero_()
    return classifier
