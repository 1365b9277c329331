"""Where a model named on the command line comes from: the registry, or a directory."""

from pathlib import Path

from tavlad.pull import pull


def fetch_model(tracking_uri: str, name: str, scratch: Path) -> Path:
    """The checkpoint directory of "NAME@best", "NAME/3", "models:/NAME@best" or of a directory's path."""
    directory = Path(name)
    if directory.is_dir():
        return directory
    return pull(tracking_uri, name, scratch).directory
