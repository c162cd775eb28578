"""A small model hub on the loopback interface, with faults that a test can switch on."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, `acme/tiny`. Everything a handler does is recorded in `requests`."""

    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    status: dict[str, int] = field(default_factory=dict)  # path suffix -> HTTP status
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # bytes of each coming answer
    wrong_content: dict[str, bytes] = field(default_factory=dict)
    redirect_to: str | None = None  # origin that files are redirected to
    ignore_ranges: bool = False
    listing: Any = None  # an answer to give in place of the right one
    endpoint: str = ""

    def announce(self) -> Any:
        """What the API says of the repository."""
        if self.listing is not None:
            return self.listing
        siblings: list[dict[str, Any]] = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name in self.lfs:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"sha": COMMIT, "siblings": siblings}

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run `hub` for the length of the block; `hub.endpoint` is its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            hub.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            for suffix, status in hub.status.items():
                if self.path.split("?")[0].endswith(suffix):
                    self.send_error(status)
                    return
            if self.path.startswith("/api/models/acme/tiny/revision/"):
                self._send(json.dumps(hub.announce()).encode())
            elif self.path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
                self._send_file(self.path.rsplit("/", 1)[1])
            else:
                self.send_error(404)

        def _send_file(self, name: str) -> None:
            if hub.redirect_to is not None:
                self.send_response(302)
                self.send_header("Location", hub.redirect_to + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = hub.wrong_content.get(name, hub.files[name])
            start = 0
            asked = self.headers.get("Range")
            if asked and not hub.ignore_ranges:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start:
                self.send_response(206)
                last = len(content) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
            else:
                self.send_response(200)
            body = content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cuts = hub.cut_after.get(name)
            if cuts:
                body = body[: cuts.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            pass  # a client that hangs up early is part of the tests

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
