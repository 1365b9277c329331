"""The compiled function does what its Python says."""

import inspect
import subprocess
import sys

import pytest
import torch

from shards.clip_bytes import encode_jpeg
from shards.clip_view import _decode_window, decode_window


def jpegs(num_frames: int) -> tuple[torch.Tensor, list[int]]:
    noise = torch.randint(0, 256, (num_frames, 3, 48, 64), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    encoded = [encode_jpeg(frame_CHW, 90) for frame_CHW in noise]
    return torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8), [len(each) for each in encoded]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window", [(0, 0, 48, 48), (5, 9, 24, 24), (10, 3, 16, 30)])
def test_compiled_is_what_is_written(window: tuple[int, int, int, int], flip: bool) -> None:
    data, lengths = jpegs(3)
    compiled, written = (torch.zeros(3, 24, 24, 3, dtype=torch.uint8).movedim(-1, 1) for _ in range(2))
    for _ in range(3):  # TorchScript compiles anew after it has seen a call or two
        decode_window(data, lengths, *window, flip, compiled)
    inspect.unwrap(_decode_window)(data, lengths, *window, flip, written)
    assert torch.equal(compiled, written)
    assert compiled.float().std() > 10


def test_what_is_no_jpeg_is_an_error() -> None:
    out = torch.zeros(1, 24, 24, 3, dtype=torch.uint8).movedim(-1, 1)
    with pytest.raises(RuntimeError):
        decode_window(torch.zeros(100, dtype=torch.uint8), [100], 0, 0, 24, 24, False, out)


_READ_FIRST = """
import ast
from concurrent.futures import ThreadPoolExecutor
import torch
from shards.clip_bytes import encode_jpeg
from shards.read import _decode_view

def parse(*_, **__):
    raise SystemError("AST constructor recursion depth mismatch")

ast.parse = parse
jpeg = encode_jpeg(torch.zeros(3, 48, 64, dtype=torch.uint8), 90)
out = torch.zeros(1, 24, 24, 3, dtype=torch.uint8).movedim(-1, 1)
with ThreadPoolExecutor(4) as threads:
    for done in [threads.submit(_decode_view, [jpeg], None, out) for _ in range(4)]:
        done.result()
"""


def test_threads_that_read_first_parse_no_python() -> None:
    """Where Python is below 3.11.8 and garbage is collected meanwhile, a parser in another thread makes both fail."""
    subprocess.run([sys.executable, "-c", _READ_FIRST], check=True)
