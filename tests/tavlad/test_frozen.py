"""A trunk that does not learn gives the same maps, however it is made fast."""

import importlib.util

import pytest
import torch
from torch import nn

import tavlad.frozen
from tavlad.backbone import TrunkNetwork, build_trunk
from tavlad.frozen import FrozenTrunk, fold, normalise


def _lived_in(name: str) -> TrunkNetwork:
    """A trunk whose batch norms have something to say."""
    torch.manual_seed(0)
    trunk = build_trunk(name)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean = 0.1 * torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return trunk


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0"])
def test_folded_trunk_is_the_same_function(name: str) -> None:
    trunk = _lived_in(name).double()
    folded = fold(trunk)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for expected, found in zip(trunk.maps(images), folded.maps(images), strict=True):
            assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


TIMM_FAMILIES = (
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "densenet121",
    "ese_vovnet19b_slim_dw",
    "fastvit_t8",
    "inception_v3",
    "mnasnet_small",
    "mobilevit_xxs",
    "regnety_002",
    "resnest14d",
    "resnet18",
    "rexnet_100",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "test_byobnet",
    "xception41p",
)
"""One small network each of timm's; many hold activations in their norms, some before and some behind convolutions."""


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason='needs the extra "timm"')
@pytest.mark.parametrize("name", TIMM_FAMILIES)
def test_frozen_timm_network_is_the_same_function(name: str) -> None:
    trunk = _lived_in(f"timm:{name}")
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    with torch.no_grad():
        expected = trunk.maps(normalise(trunk, images, torch.float32))
    for plain, found in zip(expected, FrozenTrunk(trunk).maps(images, 1), strict=True):
        assert (found - plain).abs().max() < 1e-4 * plain.abs().max()


class _NormWithSigmoid(nn.BatchNorm2d):
    """A norm that does more than its parts say."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return super().forward(input).sigmoid()


def test_form_that_is_another_function_is_refused_by_the_trunks_name() -> None:
    trunk = _lived_in("resnet18")
    trunk.set_submodule("layer3.0.bn1", _NormWithSigmoid(256).eval())
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with pytest.raises(AssertionError, match=r'frozen form of trunk "resnet18" is not the same function: .* differ by'):
        FrozenTrunk(trunk).maps(images, 1)


def test_proof_draws_nothing_and_leaves_the_trunk_as_it_is() -> None:
    trunk, images = _lived_in("resnet18"), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    generator, weights = torch.get_rng_state(), {name: each.clone() for name, each in trunk.state_dict().items()}
    FrozenTrunk(trunk).maps(images, 1)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(each, weights[name]) for name, each in trunk.state_dict().items())
    assert all(parameter.requires_grad for parameter in trunk.parameters())


def test_weights_that_are_no_numbers_are_not_blamed_on_folding() -> None:
    trunk, images = _lived_in("resnet18"), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        trunk.conv1.weight[0] = torch.nan
    assert FrozenTrunk(trunk).maps(images, 1).post_relu_BDHW.isnan().any()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size", [(64, 96), (65, 64)])
def test_fused_trunk_is_the_same_function(name: str, size: tuple[int, int]) -> None:
    folded = fold(_lived_in(name)).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        apart = folded.maps(images)
        folded.fuse()
        for expected, found in zip(apart, folded.maps(images), strict=True):
            assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_early_and_late_halves_make_the_whole() -> None:
    for name in ("resnet18", "efficientnet_lite0"):
        trunk, images = _lived_in(name), torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            whole, halves = trunk.maps(images), trunk.late(trunk.early(images))
        assert torch.equal(whole.pre_relu_BDHW, halves.pre_relu_BDHW)
        assert not torch.equal(trunk.early(images), images)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_last_maps_of_a_stored_early_map_are_those_of_the_images(precision: torch.dtype) -> None:
    trunk = _lived_in("resnet18")
    frozen, images = FrozenTrunk(trunk), torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        stored = frozen.early(images, 3).float().contiguous()
        for factor in (1.0, 1.5):  # also after the last block has learned
            with torch.no_grad():
                trunk.last_block_convs()[0].weight.mul_(factor)
            for expected, found in zip(frozen.maps(images, 3), frozen.late(stored, 3), strict=True):
                assert torch.equal(found, expected)


def test_changed_weights_are_seen_at_once() -> None:
    trunk = _lived_in("resnet18")
    frozen, images = FrozenTrunk(trunk), torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    before = frozen.maps(images, 3).post_relu_BDHW
    with torch.no_grad():
        trunk.last_block_convs()[0].weight.mul_(1.5)
        expected = trunk.maps(normalise(trunk, images, torch.float32)).post_relu_BDHW
    after = frozen.maps(images, 3).post_relu_BDHW
    assert (after - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (after - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_maps_of_a_clip_do_not_depend_on_the_clips_beside_it(precision: torch.dtype) -> None:
    frozen = FrozenTrunk(_lived_in("resnet18"))
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        together, alone = frozen.maps(images, 3), frozen.maps(images[3:], 3)
    assert together.pre_relu_BDHW.dtype == precision
    assert torch.equal(together.pre_relu_BDHW[3:], alone.pre_relu_BDHW)


def test_steps_of_the_last_block_fold_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = _lived_in("resnet18")
    trunk.requires_grad_(False)
    learned = trunk.last_block_convs()[0]
    learned.requires_grad_(True)
    frozen, images = FrozenTrunk(trunk), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    before, stale = frozen.early(images, 2), frozen.maps(images, 2).post_relu_BDHW
    counted: list[TrunkNetwork] = []
    monkeypatch.setattr(tavlad.frozen, "fold", lambda each: counted.append(each) or fold(each))
    with torch.no_grad():
        learned.weight.mul_(1.5)
    assert torch.equal(frozen.early(images, 2), before)
    assert not counted
    with torch.no_grad():
        expected = trunk.maps(normalise(trunk, images, torch.float32)).post_relu_BDHW
    found = frozen.maps(images, 2).post_relu_BDHW
    assert len(counted) == 1
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (found - stale).abs().max() > 1e-2 * stale.abs().max()
    with torch.no_grad():
        trunk.conv1.weight.mul_(1.5)
    assert not torch.equal(frozen.early(images, 2), before), "weights below the last block are seen when they change"
