"""Trunks beside the ResNets: torchvision's and timm's networks, opened up without a change to what they compute."""

import importlib.util
import time
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tavlad import trunk_timm
from tavlad.attention import class_activation
from tavlad.backbone import TrunkNetwork, build_trunk
from tavlad.config import TRUNKS, ModelConfig, parse
from tavlad.trunk import PlaceScorer, image_scores
from tavlad.trunk_weights import load_weights

has_timm = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(not has_timm, reason='needs the extra "timm"')

# name: height and width of the map of a 96x128 image, D, prefixes of the last block's convolutions and their number
PUBLISHED: dict[str, tuple[tuple[int, int], int, tuple[str, ...], int]] = {
    "densenet121": ((3, 4), 1024, ("features.denseblock4.",), 32),
    "squeezenet1_1": ((5, 7), 512, ("features.9.", "features.10.", "features.11.", "features.12."), 12),
    "googlenet": ((3, 4), 1024, ("inception5a.", "inception5b."), 12),
    "vgg16": ((6, 8), 512, ("features.24", "features.26", "features.28"), 3),
}


def _with_norms(network: nn.Module) -> nn.Module:
    """Batch norms that are not the identity, as after training."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return network.eval()


def _published(name: str) -> nn.Module:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return _with_norms(torchvision.models.get_model(name, **options))


def _filled(name: str, published: nn.Module) -> TrunkNetwork:
    trunk = build_trunk(name)
    trunk.load_state_dict(trunk.rename(published.state_dict()), strict=True)
    return trunk


@pytest.mark.parametrize("name", PUBLISHED)
def test_trunk_computes_what_torchvisions_network_does(name: str) -> None:
    published = _published(name)
    trunk = _filled(name, published)
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        maps = trunk.maps(images)
        assert maps.post_relu_BDHW.shape == (2, PUBLISHED[name][1], *PUBLISHED[name][0])
        assert trunk.feature_size == PUBLISHED[name][1]
        assert maps.pre_relu_BDHW.min() < 0
        torch.testing.assert_close(maps.post_relu_BDHW, maps.pre_relu_BDHW.clamp_min(0), rtol=0, atol=0)
        if name == "vgg16":
            torch.testing.assert_close(maps.post_relu_BDHW, published.features[:-1](images))
        else:
            torch.testing.assert_close(trunk(images), published(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_last_block_is_that_of_the_table(name: str) -> None:
    trunk = build_trunk(name)
    convs = trunk.last_block_convs()
    names = {key for key, module in trunk.named_modules() if any(module is conv for conv in convs)}
    prefixes = PUBLISHED[name][2]
    assert all(key.startswith(prefixes) for key in names)
    assert all(any(key.startswith(prefix) for key in names) for prefix in prefixes)
    assert len(names) == len(convs) == PUBLISHED[name][3]


def test_weights_file_of_old_names_and_auxiliary_heads_loads() -> None:
    """As published: DenseNet's says norm.1 for norm1, GoogLeNet's holds auxiliary heads, VGG's its linear layers."""
    dense = _published("densenet121").state_dict()
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): tensor for key, tensor in dense.items()}
    trunk = build_trunk("densenet121")
    trunk.load_state_dict(
        trunk.rename(
            {key: t for key, t in old.items() if "denselayer" in key}
            | {key: t for key, t in dense.items() if "denselayer" not in key}
        )
    )
    torch.testing.assert_close(trunk.classifier.weight, dense["classifier.weight"])
    for name, extra in (("googlenet", "aux1.conv.conv.weight"), ("vgg16", "classifier.6.weight")):
        assert extra not in build_trunk(name).rename({extra: torch.zeros(1)})


def test_winning_class_of_squeezenet_is_that_of_its_own_scores() -> None:
    """Its ReLU comes before the average: places that speak against a class do not count against it."""
    scorer = PlaceScorer(1, 2)
    with torch.no_grad():
        scorer.weight.copy_(torch.tensor([[1.0], [0.4]]))
        scorer.bias.zero_()
    places_BTND = torch.tensor([[[[3.0], [-4.0]]]])
    scores_BTC = image_scores(places_BTND, scorer)
    torch.testing.assert_close(scores_BTC[0, 0], torch.tensor([1.5, 0.6]))
    linear = nn.Linear(1, 2)
    linear.load_state_dict(scorer.state_dict())
    torch.testing.assert_close(image_scores(places_BTND, linear)[0, 0], torch.tensor([-0.5, -0.2]))
    torch.testing.assert_close(class_activation(places_BTND, scorer)[0, 0], torch.tensor([3.0, -4.0]))
    torch.testing.assert_close(class_activation(places_BTND, linear)[0, 0], torch.tensor([1.2, -1.6]))


def test_vgg16_serves_models_without_attention_alone() -> None:
    with pytest.raises(ValueError, match=r'model\.trunk = "vgg16" has no class activation map: set model\.attention'):
        ModelConfig(trunk="vgg16")
    assert ModelConfig(trunk="vgg16", attention="none").trunk == "vgg16"
    with pytest.raises(ValueError, match="three linear layers"):
        _ = build_trunk("vgg16").classifier


def test_unknown_trunk_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model\.trunk = 'resnet35': must be one of 'resnet18', .*'timm:NAME'"):
        parse(ModelConfig, {"trunk": "resnet35"}, "model")
    for name in TRUNKS:
        assert build_trunk(name).feature_size > 0


# timm


@needs_timm
@pytest.mark.parametrize(
    ("name", "activation", "last_block"),
    [
        ("timm:resnet18", nn.ReLU, {f"layer4.{b}.conv{c}" for b in (0, 1) for c in (1, 2)} | {"layer4.0.downsample.0"}),
        ("timm:tf_efficientnet_lite0", nn.ReLU6, None),
        ("timm:regnetx_002", nn.ReLU, None),
    ],
)
def test_timm_network_is_opened_up_at_its_last_activation(
    name: str, activation: type[nn.Module], last_block: set[str] | None
) -> None:
    import timm

    published = _with_norms(timm.create_model(name.removeprefix("timm:"), pretrained=False))
    trunk = _filled(name, published)
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        maps = trunk.maps(images)
        torch.testing.assert_close(trunk(images), published(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(maps.post_relu_BDHW, published.forward_features(images))
    assert isinstance(trunk, trunk_timm.TimmTrunk)
    assert isinstance(trunk.last_activation, activation)
    assert maps.pre_relu_BDHW.min() < 0
    assert maps.post_relu_BDHW.shape == (2, trunk.feature_size, 3, 4)
    convs = trunk.last_block_convs()
    names = {key for key, each in trunk.network.named_modules() if any(each is conv for conv in convs)}
    assert names
    assert last_block is None or names == last_block
    if last_block is not None:
        assert len(trunk.last_block_convs(downsample=False)) == len(convs) - 1


@needs_timm
def test_timm_lite0_is_our_lite0() -> None:
    ours, theirs = build_trunk("efficientnet_lite0"), build_trunk("timm:tf_efficientnet_lite0")
    tensors = [tensor for key, tensor in ours.state_dict().items() if "num_batches" not in key]
    keys = [key for key in theirs.state_dict() if "num_batches" not in key]
    theirs.load_state_dict(dict(zip(keys, tensors, strict=True)), strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-3, atol=1e-3)


@needs_timm
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm:mobilenetv3_small_050", "more between its last map and its scores|last map of shape"),
        ("timm:vit_tiny_patch16_224", "images of one size alone"),
        ("timm:resnet18d_of_nobody", "knows no model of this name"),
    ],
)
def test_networks_without_class_activation_maps_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        build_trunk(name)
    assert name in str(refusal.value)


def test_timm_that_is_not_installed_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., object] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else find(name, *rest))
    with pytest.raises(ValueError, match=r'"timm:resnet18" needs timm: install the extra "timm"'):
        build_trunk("timm:resnet18")


@needs_timm
def test_unreachable_timm_weights_say_how_to_supply_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # what fetches tries ten times, 46 s in all
    with pytest.raises(ValueError, match=r'weights of "timm:resnet18" could not be fetched'):
        load_weights(build_trunk("timm:resnet18"), "timm:resnet18", "imagenet")


def test_images_are_normalised_as_each_trunk_was_trained() -> None:
    seen: dict[str, Tensor] = {name: build_trunk(name).mean_C for name in ("googlenet", "densenet121")}
    assert seen["googlenet"].tolist() == [0.5, 0.5, 0.5]
    assert seen["densenet121"][0] == pytest.approx(0.485)
