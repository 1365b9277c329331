"""torchvision's 3D ResNet-18 as a trunk that sees whole clips: convolutions over space and time, with ImageNet weights
inflated from the 2D network (Carreira & Zisserman 2017, "Inflating 2D ConvNets into 3D").

Its map is 512 channels at 7x7 places (224 pixels) and every eighth frame; its last block is layer4. Weight files are
those of torchvision's resnet18. Unlike torchvision's r3d_18 it has ResNet-18's pooling after the stem, without which
these weights would meet images of twice the size they were trained on.
"""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.video import r3d_18

from tavlad.errors import UserError
from tavlad.trunk import IMAGENET_MEAN, IMAGENET_STD, TrunkMaps, TrunkNetwork


class R3d18Trunk(TrunkNetwork):
    """A ResNet-18 whose kernels are k x k x k. Its images are clips, its maps have an axis of time."""

    feature_size = 512
    has_activation_maps = False
    joins_frames = True

    def __init__(self) -> None:
        super().__init__(IMAGENET_MEAN, IMAGENET_STD)
        network = r3d_18(weights=None)
        self.stem = network.stem
        self.pool = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            network.layer1,
            network.layer2,
            network.layer3,
            network.layer4,
        )

    @property
    def has_early_map(self) -> bool:
        return False  # none that is kept: features are of frames

    @property
    def classifier(self) -> nn.Linear:
        raise UserError(
            'trunk = "r3d_18" joins frames and has no class activation map: set model.attention = "none", or choose '
            "another trunk"
        )

    def maps(self, images_BCHW: Float[Tensor, "B 3 T H W"]) -> TrunkMaps:
        return self.late(self.early(images_BCHW))

    def early(self, images_BCHW: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B E et eh ew"]:
        return self.layer3(self.layer2(self.layer1(self.pool(self.stem(images_BCHW)))))

    def late(self, early_BEHW: Float[Tensor, "B E et eh ew"]) -> TrunkMaps:
        shortcut = self.layer4[:-1](early_BEHW)
        last = self.layer4[-1]
        pre_relu = last.get_submodule("conv2")(last.get_submodule("conv1")(shortcut)) + shortcut
        return TrunkMaps(pre_relu, functional.relu(pre_relu))

    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        return [
            module
            for name, module in self.layer4.named_modules()
            if isinstance(module, nn.Conv3d) and (downsample or "downsample" not in name)
        ]

    def rename(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ResNet-18's tensors, inflated: a kernel is repeated over the frames and divided by their number, so that a
        clip of one picture gives that picture's maps (away from the clip's ends, which are padded)."""
        own = self.state_dict()
        renamed = {_video_name(key): tensor for key, tensor in published.items() if not key.startswith("fc.")}
        return {
            key: _inflated(tensor, own[key].shape[2]) if tensor.ndim == 4 and key in own else tensor
            for key, tensor in renamed.items()
        }


def _video_name(key: str) -> str:
    """torchvision's name in r3d_18 of a tensor of resnet18."""
    key = re.sub(r"^(layer\d\.\d\.)(conv|bn)(\d)\.", lambda m: f"{m[1]}conv{m[3]}.{int(m[2] == 'bn')}.", key)
    return re.sub(r"^(conv|bn)1\.", lambda m: f"stem.{int(m[1] == 'bn')}.", key)


def _inflated(kernel_OIHW: Tensor, num_frames: int) -> Float[Tensor, "O I t h w"]:
    return torch.stack([kernel_OIHW / num_frames] * num_frames, dim=2)
