"""What every trunk is: an ImageNet classifier, opened up before its global average pooling. Images in, maps out; which
parts learn and in which mode they run is the model's business."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TrunkMaps(NamedTuple):
    """The last feature map before and after the last non-linearity, D channels at h x w places.

    The same map twice for a trunk whose last operation is not one (some of timm's).
    """

    pre_relu_BDHW: Float[Tensor, "B D h w"]
    post_relu_BDHW: Float[Tensor, "B D h w"]


class PlaceScorer(nn.Linear):
    """A classifier that scores every place and averages what is positive: SqueezeNet's, a 1x1 convolution with a ReLU.

    Class activation maps take its weights as of any linear layer; only the image's scores, hence the winning class,
    are computed differently (`image_scores`).
    """


def image_scores(places_xND: Float[Tensor, "*batch N D"], classifier: nn.Linear) -> Float[Tensor, "*batch num_classes"]:
    """The ImageNet logits of an image from its last map: the classifier on the average over places, or a
    `PlaceScorer`'s average of positive scores."""
    if isinstance(classifier, PlaceScorer):
        return nn.functional.linear(places_xND, classifier.weight, classifier.bias).relu().mean(dim=-2)
    return nn.functional.linear(places_xND.mean(dim=-2), classifier.weight, classifier.bias)


class TrunkNetwork(nn.Module, ABC):
    """A network with global average pooling and one linear layer, opened up before the pooling."""

    name: str = ""
    """What `model.trunk` calls it; `build_trunk` says so."""
    feature_size: int
    """D, the channels of the maps."""
    joins_frames: bool = False
    """Whether its images are clips, (B, 3, T, H, W), and its maps (B, D, t, h, w) of t moments."""
    has_activation_maps: bool = True
    """Whether its classifier is one linear layer on the averaged map, as top-down attention needs (Eq. 4)."""
    mean_C: Float[Tensor, "3"]
    std_C: Float[Tensor, "3"]
    """The images the trunk was trained on: (RGB in [0, 1] - mean) / std. Not part of the state dict."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean_C", torch.tensor(mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(std), persistent=False)

    @property
    @abstractmethod
    def classifier(self) -> nn.Linear:
        """The 1000-class layer whose weights make the top-down attention."""

    @abstractmethod
    def maps(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> TrunkMaps:
        """The last feature maps of normalised images."""

    def early(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E eh ew"]:
        """What comes below the last block and so never learns; `late` goes on from there. By default, nothing does."""
        return images_BCHW

    @property
    def has_early_map(self) -> bool:
        """Whether `early` is more than the images themselves, so that its map is worth keeping."""
        return type(self).early is not TrunkNetwork.early

    def late(self, early_BEHW: Float[Tensor, "B E eh ew"]) -> TrunkMaps:
        """The last feature maps from what `early` gives."""
        return self.maps(early_BEHW)

    def fuse(self) -> bool:
        """Compute in fewer kernels from now on, for a folded copy that is never trained; False where the trunk does not
        know how."""
        return False

    @abstractmethod
    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        """The convolutions of the last block, which stage 2 trains; `downsample=False` leaves out a ResNet's 1x1
        convolution on the shortcut."""

    def rename(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published weight file's tensors under this trunk's own names; those of parts it does not have left out."""
        return dict(published)

    def forward(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B num_classes"]:
        """ImageNet logits of normalised images."""
        places_BND = self.maps(images_BCHW).post_relu_BDHW.flatten(2).transpose(1, 2)
        return image_scores(places_BND, self.classifier)


def convolutions(*blocks: nn.Module) -> list[nn.Module]:
    """Every 2D convolution inside the blocks, in order."""
    return [module for block in blocks for module in block.modules() if isinstance(module, nn.Conv2d)]
