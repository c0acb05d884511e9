"""A server that answers what a test tells it to, over real connections."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["CUT", "Answer", "Scripted", "scripted"]


@dataclass(frozen=True)
class Answer:
    """One answer; with status 0 the connection is cut instead."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


CUT = Answer(0)


@dataclass
class Scripted:
    """What the server answers next, the last for ever, and what it was asked."""

    answers: list[Answer]
    asked: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, bytes
    headers: list[dict[str, str]] = field(default_factory=list)
    silent: threading.Event | None = None  # it answers nothing before this is set
    url: str = ""


@contextmanager
def scripted(
    *answers: Answer, port: int = 0, silent: threading.Event | None = None
) -> Iterator[Scripted]:
    """Serve while the block runs."""
    script = Scripted(list(answers), silent=silent)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            script.asked.append((self.command, self.path, len(body)))
            script.headers.append({name.lower(): value for name, value in self.headers.items()})
            if script.silent is not None:
                script.silent.wait(30)
            answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            if not answer.status:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in (answer.headers | {"Content-Length": str(len(answer.body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        script.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()
