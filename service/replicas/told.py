"""Operations as all replicas know them: whoever is asked, answers.

Only those are told of whose id somebody has been given. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from medley.errors import MedleyError
from service.errors import NotFoundError, UnavailableError, problem
from service.replicas.board import Board
from service.versions.operations import Operation, Operations

__all__ = ["ToldOperations"]

log = logging.getLogger(__name__)


class ToldOperations:
    """The operations of this replica, and what others have told of theirs.

    Args:
        operations: its own.
        board: where they are told.
        me: this one's id there.
    """

    def __init__(self, operations: Operations, board: Board, *, me: str) -> None:
        self._operations = operations
        self._board = board
        self._me = me
        self._told: set[str] = set()
        self._turns = asyncio.Lock()  # what is told last is what is so
        self._telling: set[asyncio.Task[None]] = set()
        operations.after_end.append(self._ended)

    async def tell(self, operation: str) -> Operation:
        """Let others know of an operation before its id is given away; and once it has ended."""
        self._told.add(operation)
        await self._tell(operation)
        return self._operations.get(operation)

    async def get(self, operation: str) -> Operation:
        """An operation, whoever runs it.

        Raises:
            NotFoundError: nobody knows it.
            UnavailableError: it is none of this replica's, and the registry is away.
        """
        try:
            return self._operations.get(operation)
        except NotFoundError:
            found = await asyncio.to_thread(self._board.operation, operation)
            if found is None:
                raise
        if found.state != "running" or found.replica in await self._alive():
            return found
        gone = UnavailableError("the replica that ran it is gone", code="replica_gone")
        return replace(found, state="failed", error=problem(gone))

    async def close(self) -> None:
        """Have told what has ended."""
        if self._telling:
            await asyncio.wait(self._telling)

    async def _alive(self) -> set[str]:
        return {one.id for one in await asyncio.to_thread(self._board.replicas)}

    def _ended(self, operation: str) -> None:
        if operation in self._told:
            self._told.discard(operation)
            telling = asyncio.create_task(self._tell(operation))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def _tell(self, operation: str) -> None:
        async with self._turns:
            try:
                said = replace(self._operations.get(operation), replica=self._me)
                await asyncio.to_thread(self._board.tell, said)
            except MedleyError as error:
                log.warning("other replicas do not hear of operation %s: %s", operation, error)
