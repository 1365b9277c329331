"""Where a model named on the command line comes from: the registry, or a directory."""

from pathlib import Path

from tavlad.pull import pull
from tavlad.registry_queries import pinned


def fetch_model(tracking_uri: str, name: str, scratch: Path) -> Path:
    """The checkpoint directory of "NAME@best", "NAME/3", "models:/NAME@best" or of a directory's path."""
    directory = Path(name)
    if directory.is_dir():
        return directory
    return pull(tracking_uri, name, scratch).directory


def pin_model(tracking_uri: str, name: str) -> str:
    """A name that means the same model for as long as it is used: "NAME/3" for "NAME@best", or a whole path."""
    directory = Path(name)
    return str(directory.absolute()) if directory.is_dir() else pinned(tracking_uri, name)
