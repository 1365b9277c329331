"""The verbs of a cluster: is a site fit for work, which jobs run there, what do they say, end one."""

import datetime
from typing import Annotated

import typer

from ray_jobs.cli_settings import Settings, console, remote_site, show_output
from tavlad.errors import UserError

app = typer.Typer()
site_app = typer.Typer(
    name="site",
    help="Is a site fit for work? Example: `tavlad site check lab --recipe ta-vlad`",
    no_args_is_help=True,
)

JobArgument = Annotated[str, typer.Argument(help="A job's id, as `tavlad jobs` shows it.")]


@app.command()
def jobs() -> None:
    """List the verbs that were submitted to the site, newest first.

    Example: `tavlad --site lab jobs` (that is `tavlad jobs` with TAVLAD_SITE=lab)
    """
    chosen = remote_site()
    from ray_jobs.submit import jobs as list_jobs

    found, out = list_jobs(chosen), console()
    told = [each.metadata or {} for each in found]
    rows = [
        [
            str(each.submission_id),
            str(each.status).lower(),
            _moment(each.start_time),
            _length(each.start_time, each.end_time),
            f"{facts.get('verb', '')} {facts.get('arguments', '')}",
        ]
        for each, facts in zip(found, told, strict=True)
    ]
    out.table(["job", "state", "started", "for", "verb"], rows)
    out.result(
        {
            "jobs": [
                {"id": each.submission_id, "state": str(each.status).lower(), "verb": facts.get("verb")}
                for each, facts in zip(found, told, strict=True)
            ]
        }
    )


@app.command()
def logs(job: JobArgument) -> None:
    """Show what a job says, from its beginning until it ends; Ctrl-C stops looking, not the job.

    Example: `tavlad --site lab logs tavlad-train-1a2b3c4d5e6f-1` (`tavlad logs ID` with TAVLAD_SITE=lab)
    """
    chosen = remote_site()
    from ray_jobs.submit import follow

    ended = follow(chosen, job, console(), show_output)
    if ended.document is not None:
        console().result(ended.document)
    raise typer.Exit(ended.code)


@app.command()
def stop(job: JobArgument) -> None:
    """End a job. What it has done is kept: the same verb goes on there.

    Example: `tavlad --site lab stop tavlad-train-1a2b3c4d5e6f-1` (`tavlad stop ID` with TAVLAD_SITE=lab)
    """
    chosen = remote_site()
    from ray_jobs.submit import stop as end

    was_running = end(chosen, job)
    console().say(f"{job} is stopped" if was_running else f"{job} had ended already")
    console().result({"job": job, "stopped": was_running})


@site_app.command()
def check(
    name: Annotated[str, typer.Argument(help="A site's name or TOML file; local is the embedded one.")] = "local",
    recipe: Annotated[str | None, typer.Option(help="Also: has the cluster what this recipe asks for?")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe.")
    ] = None,
) -> None:
    """Try each thing that a run needs, and say what to do about what does not work; exit code 2 if anything fails.

    Example: `tavlad site check lab --recipe ta-vlad --set resources.gpus_per_worker=1`
    """
    Settings.site_name = name
    from infra.site import activate, load_site

    chosen = load_site(name)
    activate(chosen)
    from ray_jobs.recipe import load_recipe
    from ray_jobs.site_check import check_site

    resources = None if recipe is None else load_recipe(recipe, change, "any").resources
    findings, out = check_site(chosen, resources), console()
    out.table(
        ["", "what", "found"],
        [["ok" if each.fine else "FAILED", each.what, each.found] for each in findings],
        title=f"site {name}",
    )
    failed = [each for each in findings if not each.fine]
    for each in failed:
        out.say(f"{each.what}: {each.remedy}")
    rows = [{"what": each.what, "fine": each.fine, "found": each.found, "remedy": each.remedy} for each in findings]
    out.result({"site": name, "fine": not failed, "checks": rows})
    if failed:
        raise UserError(f"{len(failed)} of {len(findings)} checks of site {name} failed: {failed[0].remedy}")


def _moment(milliseconds: int | None) -> str:
    if milliseconds is None:
        return ""
    return datetime.datetime.fromtimestamp(milliseconds / 1000).astimezone().strftime("%Y-%m-%d %H:%M")


def _length(start: int | None, end: int | None) -> str:
    if start is None:
        return ""
    until = end / 1000 if end else datetime.datetime.now().timestamp()
    return str(datetime.timedelta(seconds=round(until - start / 1000)))
