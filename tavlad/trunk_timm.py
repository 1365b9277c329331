"""Any classifier of timm with global average pooling and one linear layer as a trunk: `trunk = "timm:NAME"`.

What is found out at the start, by running the network once on noise:

* The last map and its places: what `forward_features` returns, which must be (B, D, h, w).
* That its logits are one linear layer on the average of that map. Where a norm, a second layer or attention pooling
  stands between (ConvNeXt, MobileNetV3, ViT), there is no class activation map, and the trunk is refused.
* The last non-linearity: the activation whose output is the map. Without one, the maps before and after it are the
  same, so that `descriptor` makes no difference.
* The last block: the convolutions that make maps of the last one's height and width. For ResNet-18 and 34 that is
  layer4, as in torchvision's.
"""

import importlib.util
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tavlad.errors import UserError
from tavlad.trunk import TrunkMaps, TrunkNetwork, image_scores

PREFIX = "timm:"
_SIDE = 160  # of the noise: 5x5 places after 32-fold reduction, which no pooled 1x1 map is mistaken for


class TimmTrunk(TrunkNetwork):
    """timm's network `name`; parameters are `network.` and timm's names."""

    def __init__(self, name: str) -> None:
        network = _create(name, pretrained=False).eval()
        settings: Mapping[str, Any] = network.pretrained_cfg
        if settings.get("fixed_input_size"):
            raise UserError(f'trunk = "{name}" takes images of one size alone, as transformers do: choose another')
        super().__init__(tuple(settings["mean"]), tuple(settings["std"]))
        self.network: Any = network
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            images = torch.randn(2, 3, _SIDE, _SIDE)
            places = _check(name, network, images)
            self.last_activation = _take_off_last_activation(network, images)
            self._last_convs = _convs_of_last_resolution(network, images, places)
        self.feature_size = self.classifier.in_features

    @property
    def classifier(self) -> nn.Linear:
        return self.network.get_classifier()

    def maps(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> TrunkMaps:
        pre_relu = self.network.forward_features(images_BCHW)
        return TrunkMaps(pre_relu, self.last_activation(pre_relu))

    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        modules = dict(self.network.named_modules())
        return [modules[name] for name in self._last_convs if downsample or "downsample" not in name]

    def rename(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"network.{key}": tensor for key, tensor in published.items()}


def read_pretrained(name: str) -> dict[str, Tensor]:
    """The ImageNet weights of "timm:NAME" under timm's names. ValueError where timm has or gets none."""
    try:
        return dict(_create(name, pretrained=True).state_dict())
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f'the ImageNet weights of "{name}" could not be fetched ({reason}): set weights = "PATH" to its '
            ".safetensors or .pth file"
        ) from error


def _create(name: str, *, pretrained: bool) -> Any:
    if importlib.util.find_spec("timm") is None:
        raise UserError(f'trunk = "{name}" needs timm: install the extra "timm" (tavlad[timm])')
    import timm

    model_name = name.removeprefix(PREFIX)
    if not timm.is_model(model_name):
        near = timm.list_models(f"*{model_name.partition('.')[0]}*")[:5]
        hint = f"; it has {', '.join(near)}" if near else ""
        raise UserError(f'trunk = "{name}": timm {timm.__version__} knows no model of this name{hint}')
    return timm.create_model(model_name, pretrained=pretrained)


def _check(name: str, network: Any, images_BCHW: Tensor) -> tuple[int, int]:
    """Height and width of the last map; ValueError for a network without class activation maps."""
    classifier = network.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise UserError(
            f'trunk = "{name}" ends in {type(classifier).__name__}, not in one linear layer: it has no class '
            "activation map"
        )
    features = network.forward_features(images_BCHW)
    if features.ndim != 4 or features.shape[1] != classifier.in_features:
        raise UserError(
            f'trunk = "{name}" makes a last map of shape {tuple(features.shape[1:])}, where (D, h, w) with D = '
            f"{classifier.in_features} is needed: it has no class activation map"
        )
    scores = image_scores(features.flatten(2).transpose(1, 2), classifier)
    if not torch.allclose(scores, network(images_BCHW), rtol=1e-3, atol=1e-4):
        raise UserError(
            f'trunk = "{name}" does more between its last map and its scores than averaging and one linear layer: it '
            "has no class activation map"
        )
    return features.shape[2], features.shape[3]


def _take_off_last_activation(network: Any, images_BCHW: Tensor) -> nn.Module:
    """The activation whose output is the last map, replaced in the network by the identity; the identity if none."""
    ran: list[tuple[str, Any]] = []
    leaves = {name: module for name, module in network.named_modules() if not list(module.children()) and name}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: ran.append((name, out)))
        for name, module in leaves.items()
        if not list(module.parameters())
    ]
    expected = network.forward_features(images_BCHW)
    for handle in handles:
        handle.remove()
    times = Counter(name for name, _ in ran)
    for name in reversed([name for name, output in ran if output is expected]):
        activation = leaves[name]
        if isinstance(activation, nn.Identity | nn.Dropout) or times[name] > 1:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, nn.Identity())
        if hasattr(activation, "inplace"):
            activation.inplace = False  # the map before it is kept
        if torch.equal(activation(network.forward_features(images_BCHW)), expected):
            return activation
        setattr(network.get_submodule(parent), leaf, activation)
    return nn.Identity()


def _convs_of_last_resolution(network: Any, images_BCHW: Tensor, places: tuple[int, int]) -> tuple[str, ...]:
    """Names of the convolutions that make maps of the last one's height and width."""
    names: list[str] = []

    def watch(name: str, conv: nn.Conv2d) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if tuple(output.shape[2:]) == places:
                names.append(name)

        return conv.register_forward_hook(note)

    handles = [watch(name, each) for name, each in network.named_modules() if isinstance(each, nn.Conv2d)]
    network.forward_features(images_BCHW)
    for handle in handles:
        handle.remove()
    return tuple(dict.fromkeys(names))
