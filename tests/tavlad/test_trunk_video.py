"""The trunk that convolves over time: torchvision's network, inflated weights, and the row that trains it."""

import dataclasses

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.video import r3d_18

from ray_jobs.recipe import load_recipe
from tavlad.backbone import TrunkNetwork, build_trunk
from tavlad.config import ModelConfig
from tavlad.frozen import FrozenTrunk, fold
from tavlad.model import TaVlad
from tavlad.optim import choose_trained
from tavlad.train import Listeners, StagePlan, fit
from tests.tavlad.tiny import CONFIG, STAGE1, STAGE2, TRAINING, TinyBatches, build_model

VIDEO = dataclasses.replace(CONFIG, trunk="r3d_18", attention="none", temporal="conv3d")


def _lived_in(network: nn.Module) -> nn.Module:
    """Batch norms that are not the identity, as after training."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean = 0.1 * torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return network.eval()


def _inflated(network: nn.Module) -> TrunkNetwork:
    trunk = build_trunk("r3d_18")
    trunk.load_state_dict(trunk.rename(network.state_dict()), strict=True)
    return trunk


def test_video_of_one_picture_has_the_pictures_maps() -> None:
    """The law by which I3D inflates; far enough from the clip's ends, whose padding reaches 54 frames in."""
    published = _lived_in(resnet18(weights=None))
    picture = build_trunk("resnet18")
    picture.load_state_dict(published.state_dict())
    images = torch.randn(1, 3, 32, 32)
    clips = images[:, :, None].expand(-1, -1, 120, -1, -1)
    with torch.no_grad():
        found, expected = _inflated(published).maps(clips), picture.maps(images)
    for of_clip, of_image in zip(found, expected, strict=True):
        assert of_clip.shape == (1, 512, 15, 1, 1)
        torch.testing.assert_close(of_clip[:, :, 7], of_image, rtol=1e-3, atol=1e-4)
        assert (of_clip[:, :, 0] - of_image).abs().max() > 1e-2


def test_trunk_is_torchvisions_network_but_for_the_pooling() -> None:
    network, trunk = _lived_in(r3d_18(weights=None)), build_trunk("r3d_18")
    trunk.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")})
    trunk.pool = nn.Identity()
    clips = torch.randn(2, 3, 9, 48, 32)
    with torch.no_grad():
        pooled_BD = trunk.maps(clips).post_relu_BDHW.mean(dim=(2, 3, 4))
        torch.testing.assert_close(network.fc(pooled_BD), network(clips), rtol=1e-4, atol=1e-4)


def test_frozen_video_trunk_is_the_same_function_and_sees_each_clip_alone() -> None:
    trunk = _inflated(_lived_in(resnet18(weights=None)))
    assert not any(isinstance(module, nn.BatchNorm3d) for module in fold(trunk).modules())
    frozen = FrozenTrunk(trunk)
    clips = torch.randint(0, 256, (3, 3, 9, 32, 32), dtype=torch.uint8)
    mean, std = (each[:, None, None, None] for each in (trunk.mean_C, trunk.std_C))
    with torch.no_grad():
        expected = trunk.maps((clips / 255 - mean) / std).post_relu_BDHW
        whole, early = frozen.maps(clips, 9).post_relu_BDHW, frozen.early(clips, 9)
    assert (whole - expected).abs().max() < 1e-4 * expected.abs().max()
    torch.testing.assert_close(trunk.late(early).post_relu_BDHW, whole, rtol=1e-3, atol=1e-4)
    assert torch.equal(frozen.maps(clips[1:2], 9).post_relu_BDHW, whole[1:2])


def test_logits_are_the_average_of_the_moments_and_know_the_order_of_frames() -> None:
    model = build_model(VIDEO).eval()
    clips = torch.randint(0, 256, (2, 11, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        maps_BTDHW = model.features(clips).maps_BTDHW
        assert maps_BTDHW.shape == (2, 2, 512, 1, 1), "every eighth frame"
        expected = model.classifier(maps_BTDHW.mean(dim=(3, 4))).mean(dim=1)
        torch.testing.assert_close(model(clips), expected)
        assert (model(clips) - model(clips.flip(1))).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r'trunk = "r3d_18" joins frames and has no class activation map'):
        model.attention(clips)


def test_both_stages_train_the_classifier_and_then_the_last_block() -> None:
    model = build_model(VIDEO)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, stage in ((1, STAGE1), (2, dataclasses.replace(STAGE2, fc=False, vlad=False))):
        choose_trained(model, stage)
        plan = StagePlan(number=number, stage=stage, training=TRAINING)  # type: ignore[arg-type]
        fit(model, plan, TinyBatches(), TinyBatches(6), Listeners(on_epoch=lambda report: None))
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        learned = {f"classifier.{each}" for each in ("weight", "bias")}
        if number == 2:
            learned |= {
                f"trunk.{name}.weight"
                for name, module in model.trunk.named_modules()
                if isinstance(module, nn.Conv3d) and name.startswith("layer4")
            }
        assert changed == learned


def test_conv3d_is_for_a_trunk_that_joins_frames_and_keeps_no_features() -> None:
    for given in ({"trunk": "resnet34", "temporal": "conv3d"}, {"trunk": "r3d_18", "temporal": "consensus"}):
        with pytest.raises(ValueError, match=r"does not fit model\.temporal"):
            ModelConfig(attention="none", **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='of "conv3d" nothing is stored'):
        load_recipe("conv3d-resnet18", ["stage1.features=always"], dataset="any")
    assert isinstance(TaVlad(load_recipe("conv3d-resnet18", dataset="any").model, 3), nn.Module)
