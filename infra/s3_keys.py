"""Where a site's S3 keys come from: variables, a private file, or the role of the machine."""

import stat
from collections.abc import Mapping
from pathlib import Path

from tavlad.errors import UserError

ENVIRONMENT = "environment"
ROLE = "role"
_ACCESS_KEY = ("TAVLAD_S3_ACCESS_KEY", "AWS_ACCESS_KEY_ID")
_SECRET_KEY = ("TAVLAD_S3_SECRET_KEY", "AWS_SECRET_ACCESS_KEY")


def find_keys(site: str, source: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Access key and secret key of the site; both empty where Amazon's client finds a role's by itself.

    `source` is "environment", "role", or the path of a file of two lines that only its owner, and maybe its group, can
    read. Raises ValueError that says what to set, without any key in it.
    """
    if source == ROLE:
        return "", ""
    if source != ENVIRONMENT:
        return _from_file(Path(source).expanduser())
    return _from_environment(site, _ACCESS_KEY, environment), _from_environment(site, _SECRET_KEY, environment)


def _from_environment(site: str, variables: tuple[str, str], environment: Mapping[str, str]) -> str:
    for variable in variables:
        if environment.get(variable):
            return environment[variable]
    raise UserError(f"the S3 keys of site {site!r} are not known: set {variables[0]} (or {variables[1]})")


def _from_file(file: Path) -> tuple[str, str]:
    try:
        mode, lines = file.stat().st_mode, file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"the S3 keys cannot be read from {file} ({reason}): write two lines to it") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise UserError(f"{file} holds S3 keys and everybody can read it: chmod 600 {file}")
    if len(lines) != 2:
        raise UserError(f"{file} must hold two lines, the access key and the secret key, and has {len(lines)}")
    return lines[0], lines[1]
