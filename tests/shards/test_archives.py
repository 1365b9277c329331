"""Archives of data sets: whatever they hold, nothing is written outside, and the program a rar needs is named."""

import binascii
import io
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from shards.archives import unpack

RAR_PROGRAMS = ("unrar", "7zz", "7z", "bsdtar")


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def rar_of(files: dict[str, bytes]) -> bytes:
    """A RAR 4 archive whose members are stored, not compressed, written by the format's description."""

    def block(kind: int, flags: int, body: bytes, content: bytes = b"") -> bytes:
        head = struct.pack("<BHH", kind, flags, 7 + len(body)) + body
        return struct.pack("<H", binascii.crc32(head) & 0xFFFF) + head + content

    parts = [b"Rar!\x1a\x07\x00", block(0x73, 0, bytes(6))]
    for name, content in files.items():
        size, encoded = len(content), name.encode()
        crc = binascii.crc32(content)
        body = struct.pack("<IIBIIBBHI", size, size, 3, crc, 0x5A000000, 20, 0x30, len(encoded), 0o100644) + encoded
        parts.append(block(0x74, 0x8000, body, content))
    return b"".join([*parts, block(0x7B, 0x4000, b"")])


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt", "..\\out.txt", "C:/out.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_member_that_leaves_the_folder_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, kind: str
) -> None:
    archive = tmp_path / f"set.{kind}"
    if kind == "zip":
        archive.write_bytes(zipped({"fine.txt": b"x", name: b"x"}))
    else:
        with tarfile.open(archive, "w") as file:
            for member in ("fine.txt", name):
                file.addfile(tarfile.TarInfo(member))
    with pytest.raises(ValueError, match="would leave the folder"):
        unpack(archive, tmp_path / "to" / "folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", archive.name, "to"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_tar_member_that_is_no_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    archive = tmp_path / "set.tar"
    with tarfile.open(archive, "w") as file:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = kind, "/etc/passwd"
        file.addfile(member)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        unpack(archive, tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())


def test_archive_is_known_by_its_content(tmp_path: Path) -> None:
    archive = tmp_path / "misnamed.rar"
    archive.write_bytes(zipped({"a/b.txt": b"content"}))
    unpack(archive, tmp_path / "to")
    assert (tmp_path / "to" / "a" / "b.txt").read_bytes() == b"content"


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"", b"Rar!", zipped({"a": b"x" * 4000})[:2000]])
def test_what_is_no_whole_archive_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "set.rar"
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="fetch it again"):
        unpack(archive, tmp_path / "to")


def test_rar_without_a_program_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "set.rar"
    archive.write_bytes(rar_of({"a.txt": b"x"}))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs a program that is not here: install one of unrar, .*apt-get install"):
        unpack(archive, tmp_path / "to")


@pytest.mark.parametrize("program", RAR_PROGRAMS)
def test_rar_is_unpacked_by_each_program_and_cannot_escape(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"needs {program}, which this machine does not have")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / program).symlink_to(path)  # alone, so that it is the one that is chosen
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    archive = tmp_path / "set.rar"
    archive.write_bytes(rar_of({"wave/clip one.avi": b"content"}))
    unpack(archive, tmp_path / "to")
    assert (tmp_path / "to" / "wave" / "clip one.avi").read_bytes() == b"content"
    archive.write_bytes(rar_of({"../out.txt": b"content"}))
    with pytest.raises(ValueError, match="would leave the folder"):
        unpack(archive, tmp_path / "other")
    assert not (tmp_path / "out.txt").exists()
