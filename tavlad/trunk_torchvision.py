"""torchvision's classifiers as trunks, under torchvision's parameter names.

| trunk | map at 224 | descriptors before the last ReLU are | the last block (stage 2) |
|---|---|---|---|
| resnet18/34/50 | 512 or 2048, 7x7 | the sum of the last residual block | layer4 |
| densenet121 | 1024, 7x7 | the output of `features.norm5` | features.denseblock4 |
| squeezenet1_1 | 512, 13x13 | both expansions of the last Fire | features.9-12, the Fires after the last pooling |
| googlenet | 1024, 7x7 | the four branches of inception5b | inception5a and 5b |
| vgg16 | 512, 14x14 | the output of conv5_3 | conv5_1 to conv5_3 |

vgg16 has three linear layers and so no class activation map: it serves models without attention.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import densenet121, resnet, squeezenet1_1, vgg16
from torchvision.models.googlenet import BasicConv2d, GoogLeNet, Inception
from torchvision.models.squeezenet import Fire

from tavlad.errors import UserError
from tavlad.fused_resnet import first_convolution, fused_block, fused_block_without_last_relu
from tavlad.trunk import IMAGENET_MEAN, IMAGENET_STD, PlaceScorer, TrunkMaps, TrunkNetwork, convolutions
from tavlad.winograd import quicken


class ResNetTrunk(TrunkNetwork):
    """A ResNet; its last block is layer4."""

    def __init__(self, network: resnet.ResNet) -> None:
        super().__init__(IMAGENET_MEAN, IMAGENET_STD)
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            network.layer1,
            network.layer2,
            network.layer3,
            network.layer4,
        )
        self.fc = network.fc
        self.feature_size = network.fc.in_features
        self._is_fused = False
        quicken(self)

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def maps(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> TrunkMaps:
        return self.late(self.early(images_BCHW))

    def early(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E eh ew"]:
        if self._runs_fused():
            x = first_convolution(self.conv1, images_BCHW)
        else:
            x = functional.relu(self.bn1(self.conv1(images_BCHW)), inplace=True)
        x = functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for layer in (self.layer1, self.layer2, self.layer3):
            x = self._blocks(layer, x)
        return x

    def late(self, early_BEHW: Float[Tensor, "B E eh ew"]) -> TrunkMaps:
        x = self._blocks(self.layer4[:-1], early_BEHW)
        without_last_relu = fused_block_without_last_relu if self._runs_fused() else _without_last_relu
        pre_relu = without_last_relu(self.layer4[-1], x)
        return TrunkMaps(pre_relu, functional.relu(pre_relu))

    def fuse(self) -> bool:
        assert isinstance(self.bn1, nn.Identity), "only of a folded copy"
        self._is_fused = True
        return True

    def _runs_fused(self) -> bool:
        return self._is_fused and not torch.compiler.is_compiling()  # which fuses by itself

    def _blocks(self, blocks: nn.Sequential, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        if not self._runs_fused():
            return blocks(x)
        for block in blocks:
            x = fused_block(block, x)
        return x

    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        return [
            module
            for name, module in self.layer4.named_modules()
            if isinstance(module, nn.Conv2d) and (downsample or "downsample" not in name)
        ]


class DenseNetTrunk(TrunkNetwork):
    """DenseNet-121. Its last ReLU follows the batch normalisation of all that the last block gathered."""

    feature_size = 1024

    def __init__(self) -> None:
        super().__init__(IMAGENET_MEAN, IMAGENET_STD)
        network = densenet121(weights=None)
        self.features = network.features
        self._fc = network.classifier

    @property
    def classifier(self) -> nn.Linear:
        return self._fc

    def maps(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> TrunkMaps:
        pre_relu = self.features(images_BCHW)
        return TrunkMaps(pre_relu, functional.relu(pre_relu))

    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        return convolutions(self.features.get_submodule("denseblock4"))

    def rename(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Old files say "norm.1" where the network says "norm1"; "classifier" is ours for something else."""
        old = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.)")
        names = {key: re.sub(r"^classifier\.", "_fc.", old.sub(r"\1\2", key)) for key in published}
        return {names[key]: tensor for key, tensor in published.items()}


class SqueezeNetTrunk(TrunkNetwork):
    """SqueezeNet 1.1. Its classifier is a 1x1 convolution, a ReLU and then the average: the linear layer of Eq. 4 acts
    before the pooling, and the winning class is that of the average of positive scores (`PlaceScorer`)."""

    feature_size = 512

    def __init__(self) -> None:
        super().__init__(IMAGENET_MEAN, IMAGENET_STD)
        network = squeezenet1_1(weights=None)
        self.features = network.features
        self._fc = PlaceScorer(512, 1000)
        nn.init.normal_(self._fc.weight, std=0.01)  # as torchvision's last convolution
        nn.init.zeros_(self._fc.bias)

    @property
    def classifier(self) -> nn.Linear:
        return self._fc

    def maps(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> TrunkMaps:
        fire = cast(Fire, self.features[-1])
        x = fire.squeeze_activation(fire.squeeze(self.features[:-1](images_BCHW)))
        pre_relu = torch.cat([fire.expand1x1(x), fire.expand3x3(x)], dim=1)
        return TrunkMaps(pre_relu, functional.relu(pre_relu))

    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        pools = [place for place, module in enumerate(self.features) if isinstance(module, nn.MaxPool2d)]
        return convolutions(*self.features[pools[-1] :])

    def rename(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {re.sub(r"^classifier\.1\.", "_fc.", key): tensor for key, tensor in published.items()}
        weight = renamed.get("_fc.weight")
        if weight is not None and weight.ndim == 4:
            renamed["_fc.weight"] = weight[:, :, 0, 0]
        return renamed


class GoogLeNetTrunk(TrunkNetwork):
    """GoogLeNet, whose weights expect images from -1 to 1; its last block is the two inception modules at 7x7."""

    feature_size = 1024

    def __init__(self) -> None:
        super().__init__(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        network = GoogLeNet(aux_logits=False, init_weights=False)
        for name, module in network.named_children():
            if name not in ("avgpool", "dropout"):
                self.add_module(name, module)

    @property
    def classifier(self) -> nn.Linear:
        return cast(nn.Linear, self.get_submodule("fc"))

    def maps(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> TrunkMaps:
        x = images_BCHW
        for name, module in self.named_children():
            if name not in ("inception5b", "fc"):
                x = module(x)
        pre_relu = torch.cat([_branch_without_relu(branch, x) for branch in self._last().children()], dim=1)
        return TrunkMaps(pre_relu, functional.relu(pre_relu))

    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        return convolutions(self.get_submodule("inception5a"), self._last())

    def rename(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in published.items() if not key.startswith(("aux1.", "aux2."))}

    def _last(self) -> Inception:
        return cast(Inception, self.get_submodule("inception5b"))


class Vgg16Trunk(TrunkNetwork):
    """VGG-16 up to conv5_3, without the last pooling: ActionVLAD's trunk, and two-stream's."""

    feature_size = 512
    has_activation_maps = False

    def __init__(self) -> None:
        super().__init__(IMAGENET_MEAN, IMAGENET_STD)
        self.features = cast(nn.Sequential, vgg16(weights=None).features)[:-2]

    @property
    def classifier(self) -> nn.Linear:
        raise UserError(
            'trunk = "vgg16" has three linear layers and so no class activation map: set model.attention = "none", or '
            "choose another trunk"
        )

    def maps(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> TrunkMaps:
        pre_relu = self.features(images_BCHW)
        return TrunkMaps(pre_relu, functional.relu(pre_relu))

    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        pools = [place for place, module in enumerate(self.features) if isinstance(module, nn.MaxPool2d)]
        return convolutions(*self.features[pools[-1] :])

    def rename(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in published.items() if not key.startswith("classifier.")}


def _without_last_relu(block: nn.Module, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
    """A residual block up to the sum that its last ReLU would clip."""
    assert isinstance(block, resnet.BasicBlock | resnet.Bottleneck)
    shortcut = x if block.downsample is None else block.downsample(x)
    x = functional.relu(block.bn1(block.conv1(x)), inplace=True)
    x = block.bn2(block.conv2(x))
    if isinstance(block, resnet.Bottleneck):
        x = block.bn3(block.conv3(functional.relu(x, inplace=True)))
    return x + shortcut


def _branch_without_relu(branch: nn.Module, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
    """A branch of an inception module up to the batch normalisation that its last ReLU would clip."""
    *firsts, last = cast("Iterator[Any]", branch.children()) if isinstance(branch, nn.Sequential) else (branch,)
    for module in firsts:
        x = module(x)
    assert isinstance(last, BasicConv2d)
    return last.bn(last.conv(x))
