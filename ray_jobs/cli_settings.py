"""What every verb shares: the global options, the console and the site they choose."""

from collections.abc import Collection

from infra.site import Site, activate, load_site
from ray_jobs.console import Console

BAD_VIDEO = 3
"""Exit code when some videos could not be used."""


class Settings:
    """The global options, filled before any verb runs."""

    site_name = "local"
    json_output = False


def console() -> Console:
    """Where this verb speaks."""
    return Console(json_output=Settings.json_output)


def site(services: Collection[str] = ("s3", "mlflow", "ray")) -> Site:
    """The chosen site; those of the embedded one's services that are needed are started if they are not running.

    To be called before any module that imports ray: Ray reads its authentication settings when it is imported.
    """
    if Settings.site_name != "local":
        chosen = load_site(Settings.site_name)
    else:
        from infra.local import up as start

        chosen = start(progress=console().say, services=services)
    activate(chosen)
    return chosen
