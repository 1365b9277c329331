"""The trunks by name: what `model.trunk` may say.

What each one's maps and last block are is written where it is built: `trunk_torchvision` (a table), `trunk_video`,
`trunk_timm` (a rule), and here for EfficientNet-Lite0.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet

from tavlad.efficientnet_lite import HEAD_WIDTH, STEM_WIDTH, SameConv2d, batch_norm, build_blocks, build_classifier
from tavlad.errors import UserError
from tavlad.trunk import TrunkMaps, TrunkNetwork
from tavlad.trunk_timm import PREFIX, TimmTrunk
from tavlad.trunk_torchvision import DenseNetTrunk, GoogLeNetTrunk, ResNetTrunk, SqueezeNetTrunk, Vgg16Trunk
from tavlad.trunk_video import R3d18Trunk
from tavlad.trunk_weights import load_weights

__all__ = ["TrunkMaps", "TrunkNetwork", "build_trunk", "load_weights"]


class EfficientNetLite0Trunk(TrunkNetwork):
    """EfficientNet-Lite0 under the published weight file's names. Its "last ReLU" is the ReLU6 after the head
    convolution; its last block is the 320-channel stage and that head convolution."""

    feature_size = HEAD_WIDTH

    def __init__(self) -> None:
        super().__init__(mean=(127 / 255, 127 / 255, 127 / 255), std=(128 / 255, 128 / 255, 128 / 255))
        self._conv_stem, self._bn0 = SameConv2d(3, STEM_WIDTH, 3, stride=2), batch_norm(STEM_WIDTH)
        self._blocks = build_blocks()
        self._conv_head, self._bn1 = SameConv2d(320, HEAD_WIDTH, 1), batch_norm(HEAD_WIDTH)
        self._fc = build_classifier()

    @property
    def classifier(self) -> nn.Linear:
        return self._fc

    def maps(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> TrunkMaps:
        return self.late(self.early(images_BCHW))

    def early(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E eh ew"]:
        x = functional.relu6(self._bn0(self._conv_stem(images_BCHW)), inplace=True)
        for block in self._blocks[:-1]:
            x = block(x)
        return x

    def late(self, early_BEHW: Float[Tensor, "B E eh ew"]) -> TrunkMaps:
        pre_relu = self._bn1(self._conv_head(self._blocks[-1](early_BEHW)))
        return TrunkMaps(pre_relu, functional.relu6(pre_relu))

    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        convs: list[nn.Module] = [module for module in self._blocks[-1].modules() if isinstance(module, nn.Conv2d)]
        return [*convs, self._conv_head]


_BUILDERS: dict[str, Callable[[], TrunkNetwork]] = {
    "resnet18": lambda: ResNetTrunk(resnet.resnet18()),
    "resnet34": lambda: ResNetTrunk(resnet.resnet34()),
    "resnet50": lambda: ResNetTrunk(resnet.resnet50()),
    "efficientnet_lite0": EfficientNetLite0Trunk,
    "densenet121": DenseNetTrunk,
    "squeezenet1_1": SqueezeNetTrunk,
    "googlenet": GoogLeNetTrunk,
    "vgg16": Vgg16Trunk,
    "r3d_18": R3d18Trunk,
}


def build_trunk(name: str) -> TrunkNetwork:
    """A trunk in evaluation mode, with random weights drawn from torch's generator.

    ValueError for an unknown name, and for a "timm:" network without class activation maps.
    """
    if name not in _BUILDERS and not name.startswith(PREFIX):
        raise UserError(f'trunk = "{name}" is not known; choose one of {", ".join(_BUILDERS)}, timm:NAME')
    trunk = TimmTrunk(name) if name.startswith(PREFIX) else _BUILDERS[name]()
    trunk.name = name
    return trunk.eval()
