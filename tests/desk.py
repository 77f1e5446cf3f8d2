"""A receiver of webhooks on a free loopback port."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Desk(ThreadingHTTPServer):
    """A receiver: keeps what it takes, answers with `status`."""

    def __init__(self) -> None:
        self.status = 204
        self.taken: list[tuple[dict[str, str], bytes]] = []
        self.asked = 0
        self.changed = threading.Condition()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    def close(self) -> None:
        """Stop answering."""
        self.shutdown()
        self.server_close()

    def wait(self, condition: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 20.0), (self.asked, self.taken)


class Handler(BaseHTTPRequestHandler):
    server: Desk

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.changed:  # before the answer: who has it may look here
            status = self.server.status
            self.server.asked += 1
            if 200 <= status < 300:
                self.server.taken.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.server.changed.notify_all()
        if status == 0:
            self.wfile.write(b"garbage\r\n\r\n")
            return
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Tests are quiet."""
