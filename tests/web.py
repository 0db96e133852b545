"""A web server for tests: serves files with or without ranges, and fails as it is told to."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class Web:
    """`files`: path → bytes. `ranges`: whether parts can be asked for. `faults`: what the next answers to GET do instead."""

    def __init__(self, *, ranges: bool = True) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = ranges
        self.faults: list[str] = []  # "cut": half of the body; "error": status 503; "hang": nothing for `hang` seconds
        self.hang = 3.0
        self.asked: list[tuple[str, str]] = []  # path and range of each GET
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                data = web.files.get(self.path)
                if data is None:
                    return self.send(404, b"gone", body)
                wanted = self.headers.get("Range", "")
                if body:
                    web.asked.append((self.path, wanted))
                whole = len(data)
                fault = web.faults.pop(0) if body and web.faults and wanted != "bytes=0-0" else ""
                if fault == "error":
                    return self.send(503, b"later", body)
                if fault == "hang":
                    time.sleep(web.hang)
                status, more = 200, {}
                if wanted and web.ranges:
                    start, _, stop = wanted.removeprefix("bytes=").partition("-")
                    first, last = int(start), min(int(stop) if stop else whole - 1, whole - 1)
                    data, status, more = data[first : last + 1], 206, {"Content-Range": f"bytes {first}-{last}/{whole}"}
                return self.send(status, data, body, cut=fault == "cut", **more)

            def send(self, status: int, data: bytes, body: bool, *, cut: bool = False, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.wfile.flush()
                    self.connection.close()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
