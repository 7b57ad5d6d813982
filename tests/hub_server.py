"""A loopback server that speaks as much of the hub's HTTP API as `datasets` needs to read a dataset.

Paths and answers as datasets 5.2 and huggingface_hub 1.33 send and read them. `served` counts the bytes of each file
that were sent.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Serves datasets; `files` are USER/NAME/PATH -> content."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Requests)
        self.files, self.served = files, Counter()
        self.digests = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())

    def answer(self, body: str = "") -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/datasets/(\w+/\w+)/resolve/\w+/(.+)", path):
            return self.send_file(f"{found[1]}/{found[2]}")
        found = re.fullmatch(r"/api/datasets/(\w+/\w+)(?:/(revision|tree|paths-info)/\w+/?(.*))?", path)
        name, kind, folder = found.groups() if found else ("", "", "")
        files = {
            path.removeprefix(f"{name}/"): c for path, c in self.server.files.items() if path.startswith(f"{name}/")
        }
        if not name or not files:
            return self.send_json({"error": "Repository not found"}, 404)
        if kind == "tree":
            return self.send_json(list_folder(files, folder, "recursive=true" in self.path))
        if kind == "paths-info":
            return self.send_json([describe(path, files[path]) for path in parse_qs(body)["paths"] if path in files])
        siblings = [{"rfilename": path} for path in files]
        self.send_json({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def send_file(self, path: str) -> None:
        if path not in self.server.files:
            return self.send_json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        whole, status, headers = self.server.files[path], 200, {}
        content = whole
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(whole)), len(whole) - 1)
            content, status = whole[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(whole)}"
        headers |= {"X-Repo-Commit": COMMIT, "ETag": f'"{self.server.digests[path]}"'}
        if self.command == "GET":
            self.server.served[path] += len(content)
        self.send(content, status, "application/octet-stream", headers)

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, "application/json", headers or {})

    def send(self, content: bytes, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def describe(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": COMMIT}


def list_folder(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """All files below the folder, or its own files and folders."""
    start = f"{folder}/" if folder else ""
    below = {path: content for path, content in files.items() if path.startswith(start)}
    inner = {path.removeprefix(start).partition("/")[0] for path in below if "/" in path.removeprefix(start)}
    if recursive:
        return [describe(path, content) for path, content in below.items()]
    folders = [{"type": "directory", "path": start + name, "size": 0, "oid": COMMIT} for name in sorted(inner)]
    return folders + [describe(path, content) for path, content in below.items() if path.count("/") == start.count("/")]
