"""A wire between a replica and its Redis that a test can cut, block, or make slow.

Forwards bytes and knows nothing of what they say. One thread, whatever the number of connections.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["Proxy", "proxied"]

CHUNK_BYTES = 64 * 1024


class Proxy:
    """One port that leads to another. The port stays the same while the wire is cut."""

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._delay_s = 0.0
        self.port = 0
        self.port = self._do(self._listen())
        self.mend()

    def cut(self) -> None:
        """End all connections and refuse new ones, as a dead host's network does with a reset."""
        self._do(self._cut())

    def block(self) -> None:
        """Let nothing through, and say nothing: packets get lost."""
        self._do(self._block())

    def slow(self, delay_s: float) -> None:
        """Keep everything that is sent for so long, in each direction."""
        self._delay_s = delay_s

    def mend(self) -> None:
        """As it was."""
        self._delay_s = 0.0
        self._do(self._mend())

    def close(self) -> None:
        """End for good."""
        self._do(self._cut())
        self._do(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        return int(self._server.sockets[0].getsockname()[1])

    async def _block(self) -> None:
        self._open.clear()

    async def _cut(self) -> None:
        self._server.close()
        writers = list(self._writers)
        for writer in writers:
            writer.transport.abort()
        self._open.set()  # who waits finds its connection gone
        for writer in writers:
            with suppress(OSError):
                await writer.wait_closed()

    async def _mend(self) -> None:
        if not self._server.is_serving():
            await self._listen()
        self._open.set()

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for writer in list(self._writers):  # of those that had not even begun
            self._end(writer)
        await asyncio.sleep(0)  # the loop closes what was aborted

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)  # at once: it may be cut before it is served
        serving = self._loop.create_task(self._serve(reader, writer))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._open.wait()
            there, away = await asyncio.open_connection("127.0.0.1", self._to_port)
            self._writers.add(away)
            try:
                await asyncio.gather(self._pump(reader, away), self._pump(there, writer))
            finally:
                self._end(away)
        except OSError:
            pass  # one side is gone, and so is the other now
        finally:
            self._end(writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(CHUNK_BYTES):
            await asyncio.sleep(self._delay_s)
            await self._open.wait()
            sink.write(data)
            await sink.drain()
        raise ConnectionResetError("one side has hung up")


@contextmanager
def proxied(to_port: int) -> Iterator[Proxy]:
    """A proxy while the block runs."""
    proxy = Proxy(to_port)
    try:
        yield proxy
    finally:
        proxy.close()
