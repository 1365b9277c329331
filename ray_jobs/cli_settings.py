"""What every verb shares: the global options, the console and the site they choose."""

import sys
from collections.abc import Collection
from typing import Any, cast

import typer

from infra.site import Site, activate, is_in_job, load_site
from ray_jobs.console import Console
from tavlad.errors import UserError

BAD_VIDEO = 3
"""Exit code when some videos could not be used."""


class Settings:
    """The global options, filled before any verb runs."""

    site_name = "local"
    json_output = False
    is_driver = False
    """Whether this process does the verb itself on another site too, instead of submitting it as a job."""
    words: tuple[str, ...] = ()
    """The command line, without the program."""
    context: typer.Context | None = None
    """Of the program; its `invoked_subcommand` is the verb."""


def console() -> Console:
    """Where this verb speaks."""
    return Console(json_output=Settings.json_output)


def site(services: Collection[str] = ("s3", "mlflow", "ray"), *, keys: bool = True) -> Site:
    """The chosen site; those of the embedded one's services that are needed are started if they are not running.

    With `keys` off another site's S3 keys are left out: who only talks to MLflow needs none, since it reads its store
    itself.

    To be called before any module that imports ray: Ray reads its authentication settings when it is imported.
    """
    hand_over()
    if Settings.site_name != "local":
        chosen = load_site(Settings.site_name, keys=keys)
    else:
        from infra.local import up as start

        chosen = start(progress=console().say, services=services)
    activate(chosen)
    return chosen


def require_local() -> None:
    """UserError where the chosen site is another than the embedded one, whose services alone are ours to start and end.

    Ignoring it would end the local services of one who meant a cluster's.
    """
    if Settings.site_name != "local":
        verb = "" if Settings.context is None else Settings.context.invoked_subcommand
        raise UserError(
            f"`tavlad {verb}` is for this machine's own services, and the site is {Settings.site_name}, whose services "
            f"run elsewhere: `tavlad --site local {verb}` means those of this machine"
        )


def hand_over() -> None:
    """Submits the verb that is being run to the site's cluster and ends this one as the job ends.

    Only returns if the verb is to be done here: on the embedded site, in a job, with --here, or for verbs that need no
    cluster. `site` calls it; a verb that looks at its arguments' files first calls it before that.
    """
    from ray_jobs.job_parcel import SUBMITTED, make_parcel

    context = Settings.context
    verb = "" if context is None else str(context.invoked_subcommand)
    if Settings.site_name == "local" or Settings.is_driver or verb not in SUBMITTED or is_in_job():
        return
    assert context is not None
    chosen = remote_site()
    words = list(Settings.words[Settings.words.index(verb) + 1 :])
    values = cast(Any, context.command).commands[verb].make_context(verb, list(words), parent=context).params
    parcel = make_parcel(verb, words, values, chosen.bucket)
    from ray_jobs.submit import follow, submit

    job = submit(chosen, parcel, console(), json_output=Settings.json_output)
    ended = follow(chosen, job, console(), show_output)
    if ended.document is not None:
        console().result(ended.document)
    raise typer.Exit(ended.code)


def remote_site() -> Site:
    """The chosen site as one that only submits and looks needs it: without S3 keys, nothing is started."""
    chosen = load_site(Settings.site_name, keys=False)
    activate(chosen)
    return chosen


def show_output(text: str) -> None:
    """Part of a job's output; stdout is kept for the JSON document."""
    stream = sys.stderr if Settings.json_output else sys.stdout
    stream.write(text)
    stream.flush()
