"""A small server that speaks as much of the Hub as `load_dataset` and `from_pretrained` ask for; loopback only."""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.distributed.launch import PYTHONPATH

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(
    repo: str,
    files: dict[str, bytes],
    gated: str = "acme/gated",
    lost: Set[str] = frozenset(),
    models: dict[str, dict[str, bytes]] | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Serve one dataset repository, and models; gives the endpoint and the list of requests, which grows. What is
    uploaded to a model is added to its files.

    The connection breaks in the middle of each file in `lost`, which can change, however often it is asked for.
    """
    asked: list[str] = []
    # path of a repository's API, path of its files, what it holds
    served = [(f"/api/datasets/{repo}", f"/datasets/{repo}", repo, files)]
    served += [(f"/api/models/{name}", f"/{name}", name, held) for name, held in (models or {}).items()]

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
            if path == "/api/repos/create":
                return self.json(
                    {
                        "url": f"http://{self.headers['Host']}/{json.loads(body)['organization']}/{json.loads(body)['name']}"
                    }
                )
            if path == "/api/validate-yaml":
                return self.json({})
            for api, root, name, held in served:
                if match := re.fullmatch(rf"{root}/resolve/[^/]+/(.+)", path):
                    return self.file(held, match[1])
                if path.startswith(api):
                    return self.tell(name, held, path.removeprefix(api), body)
            return self.say(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})

        def tell(self, name: str, held: dict[str, bytes], rest: str, body: str) -> None:
            if rest == "" or rest.startswith("/revision/"):
                known = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
                known |= {"downloads": 0, "likes": 0, "siblings": [{"rfilename": file} for file in held]}
                return self.json(known)
            if match := re.fullmatch(r"/tree/[^/]+/?(.*)", rest):
                return self.tree(held, match[1])
            if rest.startswith("/paths-info/"):
                wanted = re.findall(r"[\w./-]+", body)
                return self.json([self.entry(held, file) for file in held if file in wanted])
            if rest.startswith("/preupload/"):
                paths = [file["path"] for file in json.loads(body)["files"]]
                return self.json(
                    {"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in paths]}
                )
            if rest.startswith("/commit/"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.json({"commitUrl": f"/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
            return self.say(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        def entry(self, held: dict[str, bytes], name: str) -> dict[str, Any]:
            oid = hashlib.sha1(held[name]).hexdigest()
            return {"type": "file", "path": name, "size": len(held[name]), "oid": oid}

        def tree(self, held: dict[str, bytes], folder: str) -> None:
            inside = [name for name in held if not folder or name.startswith(f"{folder}/")]
            if not inside:
                return self.say(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            folders = sorted({name.rpartition("/")[0] for name in inside} - {"", folder})
            listed = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders]
            return self.json(listed + [self.entry(held, name) for name in inside])

        def file(self, held: dict[str, bytes], name: str) -> None:
            if name not in held:
                return self.say(404, b"", {"X-Error-Code": "EntryNotFound"})
            content, status = held[name], 200
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


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """The environment of a process that takes this server for the Hub, with a cache of its own."""
    away = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_DATASETS_OFFLINE")
    return {k: v for k, v in os.environ.items() if k not in away} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": PYTHONPATH,
    }
