"""Archives as data sets are published: zip, tar, and rar by a program of the system; nothing leaves its folder."""

import lzma
import shutil
import stat
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tavlad.errors import UserError

_RAR = b"Rar!\x1a\x07"
_ZIP = b"PK\x03\x04"
_SUFFIXES = (".rar", ".zip", ".tar", ".tgz", ".gz")
_INSTALL = "install one of unrar, 7zip (7zz, 7z) or bsdtar, such as by `apt-get install libarchive-tools`"
_LINES = 3
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(frozen=True, slots=True)
class _RarProgram:
    """How a program lists an archive's names, one a line, and unpacks it into a folder."""

    name: str
    list_names: tuple[str, ...]
    unpack: Callable[[Path, Path], tuple[str, ...]]
    name_prefix: str = ""
    """What a line of the listing that names a member begins with."""


_RAR_PROGRAMS = (
    _RarProgram("unrar", ("lb",), lambda archive, to: ("x", "-idq", "-o+", str(archive), f"{to}/")),
    *(
        _RarProgram(
            name,
            ("l", "-slt", "-ba"),
            lambda archive, to: ("x", "-y", "-bso0", "-bsp0", f"-o{to}", str(archive)),
            name_prefix="Path = ",
        )
        for name in ("7zz", "7z")
    ),
    _RarProgram("bsdtar", ("-tf",), lambda archive, to: ("-xf", str(archive), "-C", str(to))),
)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip, tar or rar archive, known by its content, into a folder, which is made.

    Every name is checked before anything is written, and every result after: only plain files and folders, all below
    `folder`. Raises ValueError naming the archive and the member, or the program that a rar archive needs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        {"zip": _unpack_zip, "tar": _unpack_tar, "rar": _unpack_rar}[_kind(archive)](archive, folder)
    except _DAMAGED as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): it is damaged or cut off; fetch it again") from error
    except OSError as error:
        raise UserError(f"{archive} cannot be unpacked into {folder}: {error.strerror or error}") from error
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{archive} holds {path.relative_to(folder)}, which is neither a file nor a folder")


def archives_in(folder: Path) -> list[Path]:
    """Archives below a folder, by suffix, sorted: HMDB51 is an archive of archives."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


def check_member(archive: Path, name: str) -> str:
    """The name, if it stays below the folder it is unpacked into, on any system."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    drive = bool(parts) and parts[0].endswith(":")
    if not parts or parts[0].startswith("/") or ".." in parts or "\0" in name or drive:
        raise UserError(f"{archive} holds {name!r}, which would leave the folder: it is not the published archive")
    return name


def _kind(archive: Path) -> str:
    if not archive.is_file():
        raise UserError(f"{archive} does not exist: give the archive as it was downloaded")
    with archive.open("rb") as file:
        start = file.read(len(_RAR))
    if start == _RAR:
        return "rar"
    if start.startswith(_ZIP):
        return "zip"
    if tarfile.is_tarfile(archive):
        return "tar"
    raise UserError(f"{archive} is no rar, zip or tar archive: fetch it again, it may be an error page")


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            check_member(archive, member.filename)
        file.extractall(folder)  # noqa: S202  all names were checked


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as file:
        for member in file.getmembers():
            check_member(archive, member.name)
            if not (member.isfile() or member.isdir()):
                raise UserError(f"{archive} holds {member.name!r}, which is neither a file nor a folder")
        file.extractall(folder, filter="data")


def _unpack_rar(archive: Path, folder: Path) -> None:
    found = [(program, path) for program in _RAR_PROGRAMS if (path := shutil.which(program.name)) is not None]
    if not found:
        raise UserError(f"{archive} is a rar archive, which needs a program that is not here: {_INSTALL}")
    program, path = found[0]
    listing = _run((path, *program.list_names, str(archive)), archive)
    lines = (line for line in listing.splitlines() if line.startswith(program.name_prefix))
    for line in lines:
        check_member(archive, line.removeprefix(program.name_prefix))
    _run((path, *program.unpack(archive, folder)), archive)


def _run(command: tuple[str, ...], archive: Path) -> str:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, errors="surrogateescape", stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        lines = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-_LINES:])
        raise UserError(f"{Path(command[0]).name} cannot unpack {archive} ({lines}): fetch it again, or {_INSTALL}")
    return done.stdout
