"""A clip's bytes are plain tar members, its key goes back to its path."""

import io
import json
import os
import tarfile

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from shards.clip_bytes import (
    END_OF_SHARD,
    decode_jpeg,
    encode_jpeg,
    frame_files,
    key_of,
    path_of,
    read_tar_members,
    tar_members,
)

file_names = st.binary(min_size=1, max_size=60).map(os.fsdecode)  # whatever bytes a file system may hold


@given(path=file_names)
@example(path="wave/RATRACE_wave_f_nm_np1_fr_goo_37.avi")
@example(path="wave/Abschied !! (1).final.AVI")
@example(path="走路/ходьба 1.mp4")
@example(path="a%2Fb.avi")
def test_key_goes_back_to_its_path(path: str) -> None:
    key = key_of(path)
    assert path_of(key) == path
    assert key.isascii()
    assert not set("./\\ ") & set(key)


@given(paths=st.lists(file_names, min_size=2, max_size=2, unique=True))
def test_different_paths_have_different_keys(paths: list[str]) -> None:
    assert key_of(paths[0]) != key_of(paths[1])


@given(
    key=st.text("abcXYZ_-%09", min_size=1, max_size=200),
    files=st.dictionaries(st.sampled_from(["json", "00.jpg", "01.jpg"]), st.binary(max_size=1500), min_size=1),
)
@example(key="k" * 150, files={"json": b"{}", "00.jpg": b"x" * 600})  # over 100 bytes: an extended header
def test_members_are_read_by_tarfile_and_by_us_alike(key: str, files: dict[str, bytes]) -> None:
    members = tar_members(key, files)
    assert len(members) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(members + END_OF_SHARD)) as tar:
        read = {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore
        assert {(member.mtime, member.uid, member.gid, member.mode) for member in tar} == {(0, 0, 0, 0o644)}
    assert read == {f"{key}.{suffix}": content for suffix, content in files.items()}
    assert [bytes(content) for content in read_tar_members(members)] == list(files.values())


def test_frames_come_after_the_facts_and_in_order() -> None:
    files = frame_files({"label": 3}, [bytes([index]) for index in range(25)])
    assert list(files) == ["json", *(f"{index:02}.jpg" for index in range(25))]
    assert json.loads(files["json"]) == {"label": 3}
    assert list(frame_files({}, [b""] * 4))[1:] == ["00.jpg", "01.jpg", "02.jpg", "03.jpg"]
    assert list(frame_files({}, [b""] * 101))[1:3] == ["000.jpg", "001.jpg"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_jpeg_keeps_the_picture_and_the_bytes_repeat(layout: torch.memory_format) -> None:
    ramp_HW = torch.arange(64)[None] * 2 + torch.arange(48)[:, None]
    frame_CHW = torch.stack([ramp_HW, 255 - ramp_HW, ramp_HW.flip(0)]).to(torch.uint8)
    frame_CHW = frame_CHW[None].contiguous(memory_format=layout)[0]
    jpeg = encode_jpeg(frame_CHW, 95)
    assert jpeg == encode_jpeg(frame_CHW.clone(), 95)
    assert (decode_jpeg(jpeg).int() - frame_CHW.int()).abs().max() <= 6
