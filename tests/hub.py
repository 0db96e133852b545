"""A hub for tests: answers what datasets and huggingface_hub ask of one dataset, as the real one does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

COMMIT = "a" * 40


class FakeHub:
    """Serves `files` (path → bytes) as the dataset `name`."""

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        self.asked: list[tuple[str, str]] = []  # path and range of each GET of a file
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = self.path.split("?")[0]
                status, more, data = 200, {}, None
                if path.startswith(f"/api/datasets/{name}/revision/"):
                    data = json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": each} for each in files]}).encode()
                elif path.startswith(f"/api/datasets/{name}/tree/{COMMIT}"):
                    data = json.dumps(listing(path.partition(COMMIT)[2].strip("/"), "recursive=true" in self.path)).encode()
                elif path.startswith(f"/datasets/{name}/resolve/"):
                    data = files.get(path.split("/resolve/")[1].partition("/")[2])
                    wanted = self.headers.get("Range", "")
                    more = {"ETag": f'"{"b" * 40}"', "X-Repo-Commit": COMMIT}
                    if body and data is not None:
                        hub.asked.append((path.rsplit("/", 1)[-1], wanted))
                    if wanted and data is not None:
                        first, _, last = wanted.removeprefix("bytes=").partition("-")
                        data, status = data[int(first) : int(last) + 1], 206
                if data is None:
                    status, data = 404, b"{}"
                self.send_response(status)
                for word, value in more.items():
                    self.send_header(word, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

        def listing(folder: str, deep: bool) -> list[dict]:
            inside = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
            near = {path: data for path, data in inside.items() if deep or "/" not in path[len(folder) :].strip("/")}
            folders = {path[: path.index("/", len(folder) + 1)] for path in inside if path not in near}
            found = [{"type": "file", "oid": "b" * 40, "size": len(data), "path": path} for path, data in near.items()]
            return found + [{"type": "directory", "oid": "c" * 40, "size": 0, "path": path} for path in folders]

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
