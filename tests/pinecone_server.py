"""A loopback server that speaks the part of Pinecone's API that the store needs, with real nearest neighbours.

Shapes and limits are those of the published API (docs.pinecone.io, reference 2026-07): indexes, upsert, query, fetch,
list, delete and stats. `Pinecone(api_key=KEY, host=server.url)` is the real SDK over HTTP.
"""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy

KEY = "pcsk-secret-key"
REQUEST_BYTES, METADATA_BYTES = 2_000_000, 40_960


class PineconeServer(ThreadingHTTPServer):
    """`delay` seconds pass before reads see a write; `faults` maps a path to the statuses of its next answers.

    A status of 0 ends the connection without an answer. `polls` answers say that a new index is not ready yet.
    """

    daemon_threads = True

    def __init__(self, delay: float = 0.0, polls: int = 1):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.delay, self.polls = delay, polls
        self.indexes: dict[str, dict] = {}
        self.namespaces: dict[str, dict[str, dict]] = {}
        self.faults: dict[str, list[int]] = {}
        self.requests: Counter = Counter()
        self.lock = threading.Lock()
        self.vectors_written = 0

    def start(self) -> "PineconeServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def visible(self, namespace: str) -> dict[str, dict]:
        """The records that a read sees: not those that were written, or removed, a moment ago."""
        now = time.monotonic()
        found = {}
        for key, versions in self.namespaces.get(namespace, {}).items():
            seen = [record for at, record in versions if at + self.delay <= now]
            if seen and seen[-1] is not None:
                found[key] = seen[-1]
        return found

    def put(self, namespace: str, key: str, record: dict | None) -> None:
        self.namespaces.setdefault(namespace, {}).setdefault(key, []).append((time.monotonic(), record))


class Refused(Exception):
    """An error answer: status and message."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.handle_request(parse_qs(urlsplit(self.path).query))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if len(body) > REQUEST_BYTES:
            return self.send(400, {"code": 11, "message": "message length too large", "details": []})
        return self.handle_request(json.loads(body))

    def do_DELETE(self):
        self.handle_request({})

    def handle_request(self, given: dict) -> None:
        server, path = self.server, urlsplit(self.path).path
        with server.lock:
            server.requests[path] += 1
            if faults := server.faults.get(path):
                status = faults.pop(0)
                if status == 0:
                    self.close_connection = True
                    return
                if status != 200:
                    self.send(status, {"code": 8, "message": f"injected {status}", "details": []})
                    return
            try:
                if self.headers["Api-Key"] != KEY:
                    raise Refused(401, "Invalid API Key")
                name = "indexes" if path.startswith("/indexes") else path.strip("/").replace("/", "_")
                self.send(*getattr(self, f"answer_{name}")(path, given))
            except Refused as error:
                status, message = error.args
                self.send(status, {"error": {"code": "UNKNOWN", "message": message}, "status": status})

    def send(self, status: int, body: dict) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    # ----------------------------------------------------------------------- control plane

    def answer_indexes(self, path: str, given: dict) -> tuple[int, dict]:
        indexes = self.server.indexes
        name = path.removeprefix("/indexes").strip("/")
        if self.command == "POST":
            if given["name"] in indexes:
                raise Refused(409, "Resource already exists")
            place = {"environment": "loopback", **given["deployment"]}
            indexes[given["name"]] = {"schema": given["schema"], "deployment": place, "polls": self.server.polls}
            return 201, self.describe(given["name"])
        if not name:
            return 200, {"indexes": [self.describe(known) for known in indexes]}
        if name not in indexes:
            raise Refused(404, f"Resource {name} not found")
        return 200, self.describe(name)

    def describe(self, name: str) -> dict:
        index = self.server.indexes[name]
        index["polls"] -= 1
        ready = index["polls"] < 0
        return {
            "name": name,
            "host": self.server.url,
            "schema": index["schema"],
            "deployment": index["deployment"],
            "status": {"ready": ready, "state": "Ready" if ready else "Initializing"},
            "deletion_protection": "disabled",
            "read_capacity": {"mode": "OnDemand", "status": {"state": "Ready", "current_shards": None}},
            "tags": None,
        }

    @property
    def dimension(self) -> int:
        (index,) = self.server.indexes.values()
        return next(iter(index["schema"]["fields"].values()))["dimension"]

    # ----------------------------------------------------------------------- data plane

    def answer_vectors_upsert(self, path: str, given: dict) -> tuple[int, dict]:
        for record in given["vectors"]:
            if len(record["values"]) != self.dimension:
                raise Refused(400, f"Vector dimension {len(record['values'])} does not match {self.dimension}")
            if not any(record["values"]):
                raise Refused(400, "Dense vectors must contain at least one non-zero value")
            if len(json.dumps(record.get("metadata", {}), ensure_ascii=False).encode()) > METADATA_BYTES:
                raise Refused(400, "Metadata size exceeds the limit of 40960 bytes per vector")
            for value in record.get("metadata", {}).values():
                if not isinstance(value, str | int | float | bool | list):
                    raise Refused(400, f"Metadata value must be a string, number, boolean or list, got {value!r}")
            self.server.put(given.get("namespace", ""), record["id"], record)
            self.server.vectors_written += 1
        return 200, {"upsertedCount": len(given["vectors"])}

    def answer_query(self, path: str, given: dict) -> tuple[int, dict]:
        records = [
            record
            for record in self.server.visible(given.get("namespace", "")).values()
            if fulfils(record.get("metadata", {}), given.get("filter") or {})
        ]
        matches = []
        if records:
            vectors = numpy.array([record["values"] for record in records], dtype=numpy.float32)
            asked = numpy.array(given["vector"], dtype=numpy.float32)
            scores = vectors @ asked / numpy.linalg.norm(vectors, axis=1) / max(numpy.linalg.norm(asked), 1e-9)
            for n in numpy.argsort(-scores, kind="stable")[: given["topK"]]:
                match = {"id": records[n]["id"], "score": float(scores[n])}
                match |= {"values": records[n]["values"]} if given["includeValues"] else {}
                match |= {"metadata": records[n].get("metadata", {})} if given["includeMetadata"] else {}
                matches.append(match)
        return 200, {"matches": matches, "namespace": given.get("namespace", ""), "usage": {"readUnits": 1}}

    def answer_vectors_fetch(self, path: str, given: dict) -> tuple[int, dict]:
        namespace = given.get("namespace", [""])[0]
        known = self.server.visible(namespace)
        found = {key: known[key] for key in given["ids"] if key in known}
        return 200, {"vectors": found, "namespace": namespace, "usage": {"readUnits": 1}}

    def answer_vectors_list(self, path: str, given: dict) -> tuple[int, dict]:
        namespace, limit = given.get("namespace", [""])[0], int(given.get("limit", ["100"])[0])
        start = int(given.get("paginationToken", ["0"])[0])
        keys = sorted(self.server.visible(namespace))
        page = {"vectors": [{"id": key} for key in keys[start : start + limit]], "namespace": namespace}
        if start + limit < len(keys):
            page["pagination"] = {"next": str(start + limit)}
        return 200, {**page, "usage": {"readUnits": 1}}

    def answer_vectors_delete(self, path: str, given: dict) -> tuple[int, dict]:
        namespace = given.get("namespace", "")
        if namespace not in self.server.namespaces:
            raise Refused(404, "Namespace not found")
        for key, versions in list(self.server.namespaces[namespace].items()):
            record = versions[-1][1]
            if record is None:
                continue
            chosen = fulfils(record.get("metadata", {}), given["filter"]) if "filter" in given else False
            if given.get("deleteAll") or key in given.get("ids", []) or chosen:
                self.server.put(namespace, key, None)
        return 200, {}

    def answer_describe_index_stats(self, path: str, given: dict) -> tuple[int, dict]:
        counts = {name: {"vectorCount": len(self.server.visible(name))} for name in self.server.namespaces}
        total = sum(count["vectorCount"] for count in counts.values())
        return 200, {
            "namespaces": {name: count for name, count in counts.items() if count["vectorCount"]},
            "dimension": self.dimension,
            "indexFullness": 0,
            "totalVectorCount": total,
        }


def fulfils(metadata: dict, condition: dict) -> bool:
    """Pinecone's filter language, as far as it is documented for these operators."""
    for key, wanted in condition.items():
        if key in ("$and", "$or"):
            if not (all if key == "$and" else any)(fulfils(metadata, each) for each in wanted):
                return False
            continue
        for operator, value in (wanted if isinstance(wanted, dict) else {"$eq": wanted}).items():
            if not compare(metadata.get(key), key in metadata, operator, value):
                return False
    return True


def compare(found, is_there: bool, operator: str, value) -> bool:
    if operator == "$exists":
        return is_there is value
    if operator == "$ne":
        return is_there and not same(found, value)
    if operator == "$eq":
        return is_there and same(found, value)
    if operator == "$in":
        return is_there and any(same(found, each) for each in value)
    if isinstance(value, str | bool):
        raise Refused(400, f"the {operator} operator must be followed by a number, got {value!r}")
    if not isinstance(found, int | float) or isinstance(found, bool):
        return False
    return {"$lt": found < value, "$lte": found <= value, "$gt": found > value, "$gte": found >= value}[operator]


def same(found, value) -> bool:
    """Types are never converted: "3" is not 3, and true is not 1."""
    return isinstance(found, bool) == isinstance(value, bool) and found == value
