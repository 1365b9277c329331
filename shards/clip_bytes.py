"""One clip as it lies in a shard: consecutive tar members that share a key, a function of nothing but their content.

A shard is these byte strings one after the other and an end-of-archive mark, so it is a plain tar to everybody else,
while for us a clip is one ranged read and has one digest.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence

import torch
import torchvision.io  # pyright: ignore[reportUnusedImport]  # noqa: F401  registers torch.ops.image
from PIL import Image
from torch import Tensor

from shards.jpeg_crop import restart_interval

END_OF_SHARD = bytes(2 * tarfile.BLOCKSIZE)
_RGB = 3  # torchvision.io.ImageReadMode.RGB
_ESCAPED = re.compile(rb"[^A-Za-z0-9_-]")


def key_of(path: str) -> str:
    """The WebDataset key of a video, from its path below the videos folder; `path_of` is the inverse.

    A key may hold neither a dot (WebDataset ends the key there) nor a slash. Bytes other than ASCII letters, digits,
    `_` and `-` become %XX, so different paths have different keys, in any script and even if not valid UTF-8.

    >>> key_of("wave/a b.avi")
    'wave%2Fa%20b%2Eavi'
    """
    return _ESCAPED.sub(lambda byte: b"%%%02X" % byte[0][0], os.fsencode(path)).decode("ascii")


def path_of(key: str) -> str:
    """The path below the videos folder that has this key."""
    return os.fsdecode(re.sub(rb"%([0-9A-F]{2})", lambda code: bytes([int(code[1], 16)]), key.encode("ascii")))


def tar_members(key: str, files: Mapping[str, bytes]) -> bytes:
    """The tar members `KEY.SUFFIX`, in the mapping's order, with no owner and no time, so equal in gives equal out."""
    parts: list[bytes] = []
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size, member.mode = len(content), 0o644
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        parts += [member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"), content, padding]
    return b"".join(parts)


def read_tar_members(members: bytes) -> list[memoryview]:
    """Contents of the regular files, in order. The bytes must be ours, which their digest proves; names are skipped.

    Python's tarfile takes 1 ms of interpreter time for a clip, a tenth of its decoding, and holds the other threads up.
    """
    contents: list[memoryview] = []
    view, start = memoryview(members), 0
    while start < len(members):
        size = int(bytes(view[start + 124 : start + 135]), 8)
        is_file = view[start + 156] == ord("0")  # the others are extended headers, of names over 100 bytes
        start += tarfile.BLOCKSIZE
        if is_file:
            contents.append(view[start : start + size])
        start += size + -size % tarfile.BLOCKSIZE
    return contents


def frame_files(facts: Mapping[str, object], jpegs: Sequence[bytes]) -> dict[str, bytes]:
    """The files of a clip of frames: `json`, then `00.jpg`, `01.jpg`... (more digits for more than 100 frames)."""
    digits = max(2, len(str(len(jpegs) - 1)))
    files = {"json": json.dumps(facts, separators=(",", ":")).encode()}
    return files | {f"{index:0{digits}}.jpg": jpeg for index, jpeg in enumerate(jpegs)}


def encode_jpeg(frame_CHW: Tensor, quality: int) -> bytes:
    """An RGB uint8 image as JPEG, by libjpeg-turbo: the same bytes every time on the same installation.

    With restart markers, by which shards/jpeg_crop.py finds the part that a view needs; they cost 1 to 3 %.
    """
    image = Image.fromarray(frame_CHW.movedim(0, -1).contiguous().numpy())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, restart_marker_blocks=restart_interval(image.width))
    return buffer.getvalue()


def decode_jpeg(jpeg: bytes | memoryview) -> Tensor:
    """RGB uint8 (3, H, W). Other threads run meanwhile. RuntimeError if it is not a JPEG."""
    return torch.ops.image.decode_jpeg.default(_as_tensor(jpeg), _RGB)


def decode_jpegs(jpegs: Sequence[bytes | memoryview], device: torch.device) -> list[Tensor]:
    """Several at once, on a GPU by nvJPEG; RuntimeError if one is not a JPEG."""
    if device.type == "cuda":
        return torch.ops.image.decode_jpegs_cuda([_as_tensor(jpeg) for jpeg in jpegs], _RGB, device)
    return [decode_jpeg(jpeg) for jpeg in jpegs]


def _as_tensor(jpeg: bytes | memoryview) -> Tensor:
    return torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
