"""A trunk that does not learn, in its fastest exact form: batch norms folded into convolutions, channels last, bf16.

Ninety-seven parts in a hundred of stage 1's arithmetic are in here, and all of evaluation's and prediction's trunk.
"""

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_map

from tavlad.backbone import TrunkMaps, TrunkNetwork
from tavlad.compiled import compiled
from tavlad.precision import exact_float32

_FRAMES_PER_GPU_PASS = 256
_SAMPLE_SIDE = 96  # of the image that shows how a trunk's modules are joined; Inception takes none below 75
_SAMPLE_FRAMES = 4  # where it is a clip
_ROUNDING = 1e-3  # of the largest value; forty networks, folded, stayed below 2e-5 in float32
_Convolution = nn.Conv2d | nn.Conv3d
_Norm = nn.BatchNorm2d | nn.BatchNorm3d


_Half = Literal["maps", "early", "late"]
_Version = tuple[object, ...]


@dataclass(kw_only=True, slots=True)
class _Folded:
    """A folded copy in one precision, and which weights each of its halves was made of."""

    trunk: TrunkNetwork
    is_fused: bool
    versions: dict[_Half, _Version]
    compiled: dict[_Half, Callable[[Tensor], Any]]


class FrozenTrunk:
    """Runs `trunk` without gradients. Folded copies are kept, and mended whenever weights they show have changed.

    Folding is exact up to rounding: the same function of the weights, in fewer operations.
    """

    def __init__(self, trunk: TrunkNetwork) -> None:
        self._trunk = trunk
        self.compile = False
        """Whether what the copies compute is compiled, but for fused ones, which are as quick."""
        self.graphs = False
        """Whether it is then launched as CUDA graphs."""
        self._folded: dict[torch.dtype, _Folded] = {}

    @torch.no_grad()
    def maps(self, images_BCHW: UInt8[Tensor, "F 3 *image"], frames_per_pass: int) -> TrunkMaps:
        """The last maps of 0-255 images, or clips for a trunk that joins frames. A CPU computes `frames_per_pass` at a
        time, a GPU as many such passes at once as fit: with the frames of one clip, its maps do not depend on the clips
        beside it."""
        return _joined(self._run("maps", images_BCHW, frames_per_pass))

    @torch.no_grad()
    def early(self, images_BCHW: UInt8[Tensor, "F 3 *image"], frames_per_pass: int) -> Float[Tensor, "F E *early"]:
        """The map below the last block, which stage 2 does not train either; see `maps`."""
        return torch.cat(self._run("early", images_BCHW, frames_per_pass))

    @torch.no_grad()
    def late(self, early_BEHW: Float[Tensor, "F E eh ew"], frames_per_pass: int) -> TrunkMaps:
        """The last maps from what `early` made, the same as `maps` makes of the images."""
        return _joined(self._run("late", early_BEHW, frames_per_pass))

    def _run(self, half: _Half, inputs_BCHW: Tensor, frames_per_pass: int) -> list[Any]:
        device = inputs_BCHW.device.type
        dtype = precision_of(device, next(self._trunk.parameters()).dtype)
        with torch.inference_mode(mode=False), torch.no_grad():  # a copy made in inference mode could not be mended
            folded = self._current(dtype, half)
        run: Callable[[Tensor], Any] = getattr(folded.trunk, half)
        is_compiled = self.compile and not folded.is_fused
        if is_compiled:
            run = folded.compiled.setdefault(half, compiled(run, graphs=self.graphs))
        found: list[Any] = []
        with torch.autocast(device, enabled=False):
            for part in _passes(inputs_BCHW, frames_per_pass):
                if half == "late":
                    maps = run(part.to(dtype, memory_format=_channels_last(self._trunk)))
                else:
                    maps = run(normalise(self._trunk, part, dtype))
                # A graph's output lies where its next launch, of the pass that follows, puts its own.
                found.append(tree_map(Tensor.clone, maps) if is_compiled and self.graphs else maps)
        return found

    def _current(self, dtype: torch.dtype, half: _Half) -> _Folded:
        """The trunk as its weights are now."""
        tensors = [*self._trunk.parameters(), *self._trunk.buffers()]
        versions: dict[_Half, _Version] = {
            "maps": tuple((tensor.data_ptr(), tensor._version) for tensor in tensors),
            # What learns is not below the last block: its steps are no reason to fold again.
            "early": tuple((tensor.data_ptr(), tensor._version) for tensor in tensors if not tensor.requires_grad),
        }
        versions["late"] = versions["maps"]
        found = self._folded.get(dtype)
        if found is None or found.trunk.mean_C.device != self._trunk.mean_C.device:
            copied = fold(self._trunk).to(memory_format=_channels_last(self._trunk))
            is_fused = copied.mean_C.is_cuda and _fused(copied)
            copied.to(dtype)
            found = self._folded[dtype] = _Folded(trunk=copied, is_fused=is_fused, versions=versions, compiled={})
        elif found.versions[half] != versions[half]:
            # In place: compiled code goes on with the same memory.
            found.trunk.load_state_dict(fold(self._trunk).state_dict())
            found.versions = versions
        return found


def precision_of(device: str, otherwise: torch.dtype) -> torch.dtype:
    """What autocast computes in on a kind of device, or `otherwise` where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else otherwise


def normalise(trunk: TrunkNetwork, images_BCHW: UInt8[Tensor, "F 3 *image"], dtype: torch.dtype) -> Tensor:
    """0-255 images as the trunk was trained on them, channels last."""
    per_channel = (-1, *[1] * (images_BCHW.ndim - 2))
    mean, std = trunk.mean_C.float().view(per_channel), trunk.std_C.float().view(per_channel)
    exact = torch.promote_types(torch.float32, dtype)
    normalised = (images_BCHW.to(exact).div_(255) - mean.to(exact)).div_(std.to(exact))
    return normalised.to(dtype).contiguous(memory_format=_channels_last(trunk))


def fold(trunk: TrunkNetwork) -> TrunkNetwork:
    """A copy of the trunk in which each batch norm that follows a convolution is part of that convolution.

    AssertionError if the copy is not the same function, see `_proved_the_same`.
    """
    folded = copy.deepcopy(trunk).eval().requires_grad_(False)
    with _proved_the_same(folded) as images_BCHW:
        names = {module: name for name, module in folded.named_modules()}
        for norm, conv in _norms_after_convolutions(folded, images_BCHW).items():
            fused = fuse_conv_bn_eval(conv, norm)
            conv.weight, conv.bias = fused.weight.requires_grad_(False), fused.bias
            rest = list(norm.children())  # timm's norms go on with an activation, which is a part of theirs
            folded.set_submodule(names[norm], nn.Sequential(*rest) if rest else nn.Identity())
    return folded.requires_grad_(False)


def _norms_after_convolutions(trunk: TrunkNetwork, images_BCHW: Tensor) -> dict[_Norm, _Convolution]:
    """Which batch norm takes which convolution's output, as running the images shows."""
    outputs: list[tuple[Tensor, _Convolution]] = []
    pairs: dict[_Norm, _Convolution] = {}

    def convolved(conv: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(conv, _Convolution)
        outputs.append((output, conv))

    def normalising(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _Norm)
        source = next((conv for output, conv in outputs if output is inputs[0]), None)
        if source is not None and source not in pairs.values():
            pairs[norm] = source

    hooks = [
        module.register_forward_hook(convolved)
        if isinstance(module, _Convolution)
        else module.register_forward_pre_hook(normalising)
        for module in trunk.modules()
        if isinstance(module, _Convolution | _Norm)
    ]
    trunk.maps(images_BCHW)
    for hook in hooks:
        hook.remove()
    return pairs


@contextmanager
def _proved_the_same(trunk: TrunkNetwork) -> Generator[Tensor]:
    """What is done to the trunk inside must leave it the same function: it makes the maps of the same noise, which it
    gives, before and after. AssertionError naming the trunk otherwise, since that is our mistake.

    Costs two passes of one small image, and no draw of torch's generator. Weights that are no numbers prove nothing.
    """
    parameter = next(trunk.parameters())
    frames = [_SAMPLE_FRAMES] if trunk.joins_frames else []
    noise = torch.randn(1, 3, *frames, _SAMPLE_SIDE, _SAMPLE_SIDE, generator=torch.Generator().manual_seed(0))
    images_BCHW = noise.to(parameter).contiguous(memory_format=_channels_last(trunk))
    with exact_float32(), torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
        expected = trunk.maps(images_BCHW)
        yield images_BCHW
        found = trunk.maps(images_BCHW)
    for plain, other in zip(expected, found, strict=True):
        error = ((other - plain).abs().max() / plain.abs().max().clamp_min(1e-30)).item()
        if plain.isfinite().all() and not error <= _ROUNDING:
            raise AssertionError(
                f'the frozen form of trunk "{trunk.name}" is not the same function: its maps differ by {error:.1e} of '
                f"the largest value, and rounding explains {_ROUNDING:g}"
            )


def _fused(folded: TrunkNetwork) -> bool:
    """Whether the trunk knows how to be computed in fewer kernels, and now is."""
    with _proved_the_same(folded):
        return folded.fuse()


def _channels_last(trunk: TrunkNetwork) -> torch.memory_format:
    return torch.channels_last_3d if trunk.joins_frames else torch.channels_last


def _passes(inputs_BCHW: Tensor, frames_per_pass: int) -> tuple[Tensor, ...]:
    if inputs_BCHW.device.type != "cpu":
        frames_per_pass *= max(1, _FRAMES_PER_GPU_PASS // frames_per_pass)
    frames_per_input = inputs_BCHW.shape[2] if inputs_BCHW.ndim == 5 else 1
    return inputs_BCHW.split(max(1, frames_per_pass // frames_per_input))


def _joined(passes: list[TrunkMaps]) -> TrunkMaps:
    return TrunkMaps(
        pre_relu_BDHW=torch.cat([each.pre_relu_BDHW for each in passes]),
        post_relu_BDHW=torch.cat([each.post_relu_BDHW for each in passes]),
    )
