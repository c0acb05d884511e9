"""`medley task rollout`: a candidate version beside the live one."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.console import (
    DEFAULT_URL,
    AdminKey,
    IfMatch,
    Json,
    ReadKey,
    Url,
    one_line_errors,
    open_client,
    out,
)

if TYPE_CHECKING:
    from service.wire.rollout_schemas import RolloutAnswer

__all__ = ["rollout_commands"]

rollout_commands = typer.Typer(no_args_is_help=True, help="Try a candidate beside what is live.")


class Mode(StrEnum):
    """Whether the candidate only computes, or answers."""

    SHADOW = "shadow"
    CANARY = "canary"


@rollout_commands.command()
def start(
    task: str,
    version: str,
    url: Url = DEFAULT_URL,
    key: AdminKey = None,
    mode: Annotated[Mode, typer.Option(help="Only compute, or answer.")] = Mode.SHADOW,
    share: Annotated[float, typer.Option(help="Of the live version's images.")] = 0.1,
    min_images: Annotated[int, typer.Option(help="Compared before it can be stopped.")] = 100,
    max_disagreement: Annotated[
        float, typer.Option(help="Share of other labels that stops it.")
    ] = 0.1,
    max_errors: Annotated[int, typer.Option(help="Images that it may fail.")] = 0,
    if_match: IfMatch = None,
) -> None:
    """Try a registered version on a share of the live version's images."""
    from service.wire.rollout_schemas import Rollout

    with one_line_errors(), open_client(url, key) as client:
        wanted = Rollout(
            version=version,
            mode=mode.value,
            share=share,
            min_images=min_images,
            max_disagreement=max_disagreement,
            max_errors=max_errors,
        )
        _say(client.start_rollout(task, wanted, if_match=if_match))


@rollout_commands.command()
def show(task: str, url: Url = DEFAULT_URL, key: ReadKey = None, as_json: Json = False) -> None:
    """Show how a task's rollout stands on this server."""
    with one_line_errors(), open_client(url, key) as client:
        answer = client.rollout(task)
    if as_json:
        out.print_json(answer.model_dump_json(), indent=None)
    else:
        _say(answer)


@rollout_commands.command()
def stop(task: str, url: Url = DEFAULT_URL, key: AdminKey = None, if_match: IfMatch = None) -> None:
    """End a rollout; what is live stays."""
    with one_line_errors(), open_client(url, key) as client:
        client.stop_rollout(task, if_match=if_match)
    out.print(f"{task}: no rollout")


@rollout_commands.command()
def promote(
    task: str, url: Url = DEFAULT_URL, key: AdminKey = None, if_match: IfMatch = None
) -> None:
    """Make the candidate live."""
    with one_line_errors(), open_client(url, key) as client:
        answer = client.promote(task, if_match=if_match)
    out.print(f"{answer.task}: live is {answer.live}")


def _say(answer: RolloutAnswer) -> None:
    wanted, seen = answer.rollout, answer.same + answer.different
    state = f"stopped: {answer.stopped}" if answer.stopped else "running"
    differ = f"{answer.different / seen:.1%} with another label" if seen else "nothing compared yet"
    out.print(
        f"{answer.task}: {wanted.mode} of {wanted.version} beside {answer.live} on "
        f"{wanted.share:.0%} of the images, {state}; {seen} compared, {differ}, "
        f"{answer.errors} failed",
        soft_wrap=True,
        highlight=False,
    )
