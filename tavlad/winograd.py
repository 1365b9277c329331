"""3x3 convolutions of stride 1 on a CPU by Winograd's F(4x4, 3x3): 36 products for 16 outputs where the sum has 144.

Rounding is five to ten times that of the sum itself in float32, up to 2e-5 of the largest output.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_LEAST_CHANNELS = 128
"""With fewer, moving tiles costs what products save."""
_LEAST_SIDE = 7
"""Of smaller maps the tiles are mostly margin."""
_TILES_PER_PASS = 256
"""So many that what is between two steps stays in the cache."""

_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


class Convolution(nn.Conv2d):
    """A 3x3 convolution that keeps the sides, and takes the quicker way to."""

    plain = False
    """Whether it is left to PyTorch."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Convolution":
        """With the same parameters."""
        made = cls(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None, device="meta")
        made.weight, made.bias = conv.weight, conv.bias
        return made

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the base's name
        quicker = (
            not self.plain
            and input.device.type == "cpu"
            and input.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and min(self.weight.shape[:2]) >= _LEAST_CHANNELS
            and min(input.shape[2:]) >= _LEAST_SIDE
        )
        return convolution(input, self.weight, self.bias) if quicker else super().forward(input)


def quicken(network: nn.Module) -> None:
    """Replace what can be so computed, under the same names."""
    for name, conv in list(network.named_modules()):
        if isinstance(conv, nn.Conv2d) and _geometry(conv) == ((3, 3), (1, 1), (1, 1), (1, 1), 1):
            network.set_submodule(name, Convolution.of(conv))


def _geometry(conv: nn.Conv2d) -> tuple[object, ...]:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups


def convolution(
    x: Float[Tensor, "B C H W"], weight: Float[Tensor, "D C 3 3"], bias: Float[Tensor, " D"] | None = None
) -> Float[Tensor, "B D H W"]:
    """`conv2d(x, weight, bias, padding=1)`, with gradients."""
    return _Convolution.apply(x, weight, bias)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolved(x, _kernels(weight).transpose(1, 2), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        wrt_x = _convolved(grad, _kernels(weight.flip(2, 3))) if ctx.needs_input_grad[0] else None
        wrt_weight = _weight_gradient(x, grad, weight) if ctx.needs_input_grad[1] else None
        return wrt_x, wrt_weight, grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


def _both_ways(rows: tuple[tuple[int | float, ...], ...], like: Tensor) -> Tensor:
    """The matrix for flattened squares of what `rows` do to each side."""
    one_way = torch.tensor(rows, dtype=torch.float64)
    return torch.kron(one_way, one_way).to(like.dtype)


def _kernels(weight_DC33: Tensor) -> Float[Tensor, "36 D C"]:
    num_out, num_in = weight_DC33.shape[:2]
    flat = weight_DC33.permute(2, 3, 0, 1).reshape(9, -1)
    return (_both_ways(_KERNEL, weight_DC33) @ flat).view(36, num_out, num_in)


def _tiles(x_BCHW: Tensor) -> Float[Tensor, "36 N C"]:
    """Tiles of 6x6 that overlap by two, transformed."""
    channels, height, width = x_BCHW.shape[1:]
    rows, columns = -(-height // 4), -(-width // 4)
    padded = functional.pad(x_BCHW.permute(0, 2, 3, 1), (0, 0, 1, 4 * columns + 1 - width, 1, 4 * rows + 1 - height))
    tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)
    return (_both_ways(_INPUT, x_BCHW) @ tiles.reshape(36, -1)).view(36, -1, channels)


def _convolved(x_BCHW: Tensor, kernels_36CD: Tensor, bias_D: Tensor | None = None) -> Tensor:
    num_images, num_in, height, width = x_BCHW.shape
    rows, columns = -(-height // 4), -(-width // 4)
    num_out = kernels_36CD.shape[2]
    found = x_BCHW.new_empty(num_images, height, width, num_out)
    per_pass = min(num_images, max(1, _TILES_PER_PASS // (rows * columns)))
    tiles_per_pass = per_pass * rows * columns
    padded = x_BCHW.new_zeros(per_pass, 4 * rows + 2, 4 * columns + 2, num_in)
    # All passes use the same memory, which is then in the cache.
    tiles, spread = x_BCHW.new_empty(2, 36 * tiles_per_pass * num_in).unbind()
    products = x_BCHW.new_empty(36 * tiles_per_pass * num_out)
    squares = x_BCHW.new_empty(16 * tiles_per_pass * num_out)
    to_input, to_output = _both_ways(_INPUT, x_BCHW), _both_ways(_OUTPUT, x_BCHW)
    for part, into in zip(x_BCHW.permute(0, 2, 3, 1).split(per_pass), found.split(per_pass), strict=True):
        num = len(part) * rows * columns
        padded[: len(part), 1 : 1 + height, 1 : 1 + width] = part
        here = padded[: len(part)].unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)
        tiles_ = tiles[: 36 * num * num_in].view(36, -1)
        tiles_.view(here.shape).copy_(here)
        spread_ = torch.mm(to_input, tiles_, out=spread[: 36 * num * num_in].view(36, -1)).view(36, num, num_in)
        products_ = torch.bmm(spread_, kernels_36CD, out=products[: 36 * num * num_out].view(36, num, num_out))
        squares_ = torch.mm(to_output, products_.view(36, -1), out=squares[: 16 * num * num_out].view(16, -1))
        whole = squares_.view(4, 4, len(part), rows, columns, num_out).permute(2, 3, 0, 4, 1, 5)
        if height % 4 or width % 4:
            whole = whole.reshape(len(part), 4 * rows, 4 * columns, num_out)[:, :height, :width]
        else:
            into = into.view(whole.shape)
        if bias_D is None:
            into.copy_(whole)
        else:
            torch.add(whole, bias_D, out=into)
    return found.permute(0, 3, 1, 2)


def _weight_gradient(x_BCHW: Tensor, grad_BDHW: Tensor, weight: Tensor) -> Tensor:
    num_images, channels, height, width = grad_BDHW.shape
    rows, columns = -(-height // 4), -(-width // 4)
    padded = functional.pad(grad_BDHW.permute(0, 2, 3, 1), (0, 0, 0, 4 * columns - width, 0, 4 * rows - height))
    squares = padded.view(num_images, rows, 4, columns, 4, channels).permute(2, 4, 0, 1, 3, 5).reshape(16, -1)
    spread = (_both_ways(_OUTPUT, x_BCHW).T @ squares).view(36, -1, channels)
    products = torch.bmm(spread.transpose(1, 2), _tiles(x_BCHW))
    flat = _both_ways(_KERNEL, x_BCHW).T @ products.view(36, -1)
    return flat.view(3, 3, *weight.shape[:2]).permute(2, 3, 0, 1)
