"""`medley store`: look through the bundles that replicas share, and delete what nobody needs."""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.console import Json, fail, one_line_errors, out

if TYPE_CHECKING:
    from service.bundles.blobs import Blobs
    from service.bundles.collector import Collected
    from service.bundles.inspection import Inspection
    from service.settings import Settings

__all__ = ["store_commands"]

NOWHERE = "no store is shared: MEDLEY_REGISTRY and MEDLEY_BUNDLE_STORE say where one is"

store_commands = typer.Typer(
    no_args_is_help=True,
    help="The bundles that replicas share; MEDLEY_BUNDLE_STORE and MEDLEY_REGISTRY* say where.",
)


@store_commands.command()
def check(
    verify: Annotated[
        bool, typer.Option(help="Fetch every bundle and check each byte of it.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Compare the store with what the registry's newest copy in it names; changes nothing.

    Status 1 if a bundle that is named is lost or damaged. Asks no Redis.
    """
    from service.bundles.inspection import inspect
    from service.settings import Settings

    with one_line_errors():
        found = inspect(_open(Settings()), verify=verify)
    if as_json:
        out.print_json(json.dumps(_fields(found) | {"sound": found.is_sound}), indent=None)
    else:
        _show(found, verified=verify)
    raise typer.Exit(0 if found.is_sound else 1)


@store_commands.command()
def collect(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what nobody has needed for MEDLEY_KEEP_UNUSED_S, as replicas do every few minutes."""
    from service.settings import Settings

    with one_line_errors():
        settings = Settings()
        found = _collect(settings, dry_run=dry_run)
        if found is None:
            fail("a replica goes through the store just now; ask again", status=1)
    old = [d for d, age_s in found.unused_s.items() if age_s >= settings.keep_unused_s]
    if as_json:
        out.print_json(json.dumps(_fields(found) | {"old": old}), indent=None)
        return
    for digest in sorted(found.deleted):
        out.print(f"{digest} is gone", highlight=False, soft_wrap=True)
    for digest in sorted(found.lost):
        out.print(f"{digest} is lost", highlight=False, soft_wrap=True, style="bold red")
    for digest, age_s in found.unused_s.items():
        goes = "would go" if dry_run and digest in old else "stays for now"
        out.print(f"{digest} {goes}: unused for {age_s:.0f} s", highlight=False, soft_wrap=True)
    out.print(f"{len(found.named)} bundles are needed, {len(found.deleted)} deleted")


def _open(settings: Settings) -> Blobs:
    from service.bundles.blobs import Blobs

    if not settings.bundle_store:
        fail(NOWHERE)
    return Blobs(settings.bundle_store, timeout_s=settings.bundle_store_timeout_s)


def _collect(settings: Settings, *, dry_run: bool) -> Collected | None:
    """One pass, as of a replica with nothing in its cache."""
    from service.bundles.collector import Collector
    from service.bundles.store import BundleStore
    from service.registry.backup import Backup
    from service.registry.redis_registry import RedisRegistry
    from service.replicas.board import RedisBoard
    from service.replicas.shared import open_shared
    from service.signals.metrics import Metrics

    at_once = settings.model_copy(update={"registry_wait_s": 0})
    shared = asyncio.run(open_shared(at_once, at=lambda step: None))
    if shared is None:
        fail(NOWHERE)
    backup, prefix = Backup(shared.blobs), settings.registry_prefix
    with closing(shared.client), tempfile.TemporaryDirectory(prefix="medley-") as folder:
        copy = backup.newest()
        if copy is None:
            fail("no replica has used this store yet")
        with closing(BundleStore(Path(folder), shared.store)) as store:
            collector = Collector(
                registry=RedisRegistry(
                    shared.client, prefix=prefix, backup=backup, backbone=copy.backbone
                ),
                store=store,
                ledger=shared.ledger,
                in_use=RedisBoard(shared.client, prefix=prefix, ttl_s=settings.replica_ttl_s).files,
                keep_s=settings.keep_unused_s,
                metrics=Metrics(),
            )
            return collector.collect(dry_run=dry_run)


def _show(found: Inspection, *, verified: bool) -> None:
    said = "no registry has" if found.generation is None else f"generation {found.generation} has"
    out.print(f"{said} {len(found.named)} bundles", highlight=False)
    rows: list[tuple[str, str]] = [(digest, "lost") for digest in sorted(found.lost)]
    rows += [(digest, f"damaged: {why}") for digest, why in found.damaged.items()]
    rows += [(digest, "unused") for digest in sorted(found.unused.difference(found.damaged))]
    rows += [(name, "half") for name in found.halves]
    rows += [(name, "foreign, left alone") for name in found.foreign]
    for name, state in rows:  # no table: whole names, one a line, for grep
        out.print(f"{name}  {state}", markup=False, highlight=False, soft_wrap=True)
    if not found.is_sound:
        out.print("register again what is lost or damaged", style="bold red")
    elif verified:
        out.print("every bundle that is named is whole")
    else:
        out.print("every bundle that is named is there")


def _fields(found: Inspection | Collected) -> dict[str, Any]:
    return {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in vars(found).items()
    }
