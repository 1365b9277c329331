"""The parts of a folded ResNet in as few kernels as cuDNN has: a convolution with its bias, the shortcut and the ReLU
is one. Apart, the passes over memory between convolutions take a third of the forward pass on an H200 (docs/LOG.md)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet

_CHANNELS = 16
"""The first convolution's, made up with zeros: tensor cores take eight at a time."""


def fused_block(block: nn.Module, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
    """A residual block of a folded network."""
    last, x, shortcut = _up_to_last(block, x)
    if not x.is_cuda:
        return functional.relu(last(x) + shortcut)
    return torch.cudnn_convolution_add_relu(
        x, last.weight, shortcut, 1.0, last.bias, last.stride, _pads(last), last.dilation, last.groups
    )


def fused_block_without_last_relu(block: nn.Module, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
    """The same up to the sum that its last ReLU would clip."""
    last, x, shortcut = _up_to_last(block, x)
    return last(x) + shortcut


def first_convolution(conv: nn.Conv2d, images_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
    """The 7x7 convolution of stride 2 and its ReLU, where the sides are even as a 4x4 one of stride 1: of blocks of 2x2
    pixels with 12 channels, which keep tensor cores busy where 3 do not."""
    assert (conv.kernel_size, conv.stride, conv.padding) == ((7, 7), (2, 2), (3, 3))
    height, width = images_BCHW.shape[2:]
    if height % 2 or width % 2:
        return _convolved(images_BCHW, conv.weight, conv.bias, conv.stride, _pads(conv))
    num_images, rows, columns = len(images_BCHW), height // 2, width // 2
    # Output i is of rows 2i-3 to 2i+3; with a row of zero weights before them, of blocks i-2 to i+1.
    blocks_BCHW = images_BCHW.new_zeros(num_images, rows + 3, columns + 3, _CHANNELS).movedim(-1, 1)
    inside = blocks_BCHW[:, :12, 2 : 2 + rows, 2 : 2 + columns].unflatten(1, (3, 2, 2))
    inside.copy_(images_BCHW.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 1, 3, 5, 2, 4))
    weight = functional.pixel_unshuffle(functional.pad(conv.weight, (1, 0, 1, 0)), 2)
    weight = functional.pad(weight, (0, 0, 0, 0, 0, _CHANNELS - 12)).contiguous(memory_format=torch.channels_last)
    return _convolved(blocks_BCHW, weight, conv.bias, (1, 1), (0, 0))


def _up_to_last(block: nn.Module, x: Tensor) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """The block's last convolution, what it is given, and the shortcut."""
    assert isinstance(block, resnet.BasicBlock | resnet.Bottleneck)
    shortcut = x if block.downsample is None else block.downsample(x)
    *firsts, last = (block.conv1, block.conv2, *([block.conv3] if isinstance(block, resnet.Bottleneck) else []))
    for conv in firsts:
        x = _convolved(x, conv.weight, conv.bias, conv.stride, _pads(conv))
    return last, x, shortcut


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], pads: tuple[int, ...]
) -> Tensor:
    """With the ReLU."""
    if not x.is_cuda:
        return functional.relu(functional.conv2d(x, weight, bias, stride, pads), inplace=True)
    return torch.cudnn_convolution_relu(x, weight, bias, stride, pads, (1, 1), 1)


def _pads(conv: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(conv.padding, str)
    return conv.padding
