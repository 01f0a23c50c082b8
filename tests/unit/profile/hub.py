"""A small server that speaks as much of the Hub's API as `load_dataset` asks for; loopback only."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(
    repo: str, files: dict[str, bytes], gated: str = "acme/gated", lost: frozenset[str] = frozenset()
) -> Iterator[tuple[str, list[str]]]:
    """Serve one dataset repository; gives the endpoint and the list of requests, which grows.

    The connection breaks in the middle of each file in `lost`, however often it is asked for.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length).decode() if length else ""
            asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            if path.startswith((f"/api/datasets/{gated}", f"/datasets/{gated}")):
                return self.say(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            if match := re.fullmatch(rf"/datasets/{repo}/resolve/[^/]+/(.+)", path):
                return self.file(match[1])
            if not path.startswith(f"/api/datasets/{repo}"):
                return self.say(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
            rest = path.removeprefix(f"/api/datasets/{repo}")
            if rest == "" or rest.startswith("/revision/"):
                known = {"id": repo, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
                known |= {"downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in files]}
                return self.json(known)
            if match := re.fullmatch(r"/tree/[^/]+/?(.*)", rest):
                return self.tree(match[1])
            if rest.startswith("/paths-info/"):
                wanted = re.findall(r"[\w./-]+", body)
                return self.json([self.entry(name) for name in files if name in wanted])
            return self.say(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        def entry(self, name: str) -> dict[str, Any]:
            return {
                "type": "file",
                "path": name,
                "size": len(files[name]),
                "oid": hashlib.sha1(files[name]).hexdigest(),
            }

        def tree(self, folder: str) -> None:
            inside = [name for name in files if not folder or name.startswith(f"{folder}/")]
            if not inside:
                return self.say(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            folders = sorted({name.rpartition("/")[0] for name in inside} - {"", folder})
            listed = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders]
            return self.json(listed + [self.entry(name) for name in inside])

        def file(self, name: str) -> None:
            if name not in files:
                return self.say(404, b"", {"X-Error-Code": "EntryNotFound"})
            content, status = files[name], 200
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            headers["Accept-Ranges"] = "bytes"
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(match[1]), int(match[2] or len(content) - 1)
                end = min(end, len(content) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
                content, status = content[start : end + 1], 206
            return self.say(status, content, headers, breaks=name in lost and self.command == "GET")

        def json(self, value: Any) -> None:
            self.say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def say(self, status: int, content: bytes, headers: dict[str, str], breaks: bool = False) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if breaks:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
