"""How the command ends when a verb fails: the user's mistakes as one sentence, all others with where to report them."""

import importlib.metadata
import os
import platform
import shlex
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from infra.site import is_in_job
from tavlad.errors import UserError

OUR_MISTAKE, USER_ERROR, INTERRUPTED = 1, 2, 130
"""Exit codes."""
_PACKAGES = ("tavlad", "ray", "torch", "mlflow", "pyarrow", "numpy")


class Interrupted(Exception):
    """A verb that Ctrl-C or SIGTERM has ended. Typer ends at a KeyboardInterrupt by itself, without a word."""


class Verbs(TyperGroup):
    """All verbs."""

    def invoke(self, ctx: Any) -> Any:
        """Do the verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error


def tell(error: Exception, words: Sequence[str]) -> int:
    """Say on stderr why the command with these words ends; returns its exit code."""
    command = shlex.join(["tavlad", *words])
    if isinstance(error, Interrupted):
        # A job's words name files as the job finds them.
        how = "run the same command again" if is_in_job() else f"run: {command}"
        typer.echo(f"stopped; to go on, {how}", err=True)
        return INTERRUPTED
    # Ray raises what a task raised as a kind of both, whose text is the task's traceback.
    cause = getattr(error, "cause", None)
    users = cause if isinstance(cause, UserError) else error
    if not isinstance(users, UserError) or os.environ.get("TAVLAD_TRACEBACK") == "1":
        typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if isinstance(users, UserError):
        typer.echo(f"error: {users}", err=True)
        return USER_ERROR
    typer.echo(
        f"error: something in tavlad, or in a library it uses, went wrong ({type(error).__name__}): report it with "
        f"this traceback, the command `{command}` and these versions: {_versions()}",
        err=True,
    )
    return OUR_MISTAKE


def _versions() -> str:
    installed = {each.name: each.version for each in importlib.metadata.distributions() if each.name in _PACKAGES}
    python = f"Python {platform.python_version()}, {platform.platform()}"
    return ", ".join([*(f"{name} {installed[name]}" for name in _PACKAGES if name in installed), python])
