"""A stand-in for Google Cloud Storage's JSON API, with generations and preconditions, that google-cloud-storage talks to
through STORAGE_EMULATOR_HOST: uploads of one request, metadata, content and deletion (cloud.google.com/storage/docs/json_api).
"""

import contextlib
import json
import re
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket(ThreadingHTTPServer):
    """Objects by `bucket/name`: a resource and its content. `age` makes all look so many seconds older; `down` answers 503."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Api)
        self.objects, self.generation, self.mutex = {}, 1000, threading.Lock()
        self.age, self.down, self.requests = 0.0, False, []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, name, resource, content):
        self.generation += 1
        bucket, _, path = name.partition("/")
        now = (datetime.now(UTC) - timedelta(seconds=self.age)).isoformat().replace("+00:00", "Z")
        made = {"name": path, "bucket": bucket, "generation": str(self.generation), "metageneration": "1"}
        made |= {"updated": now, "timeCreated": now, "size": str(len(content)), "kind": "storage#object"}
        self.objects[name] = (resource | made, content)
        return self.objects[name][0]


class Api(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, code, body=b""):
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handled(self, method):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((method, url.path, query))
        if url.path.count("/") == 4:  # of the bucket itself, which the client asks for its own records
            return self.answer(404, {"error": {"code": 404, "message": "no such bucket"}})
        if self.server.down:
            return self.answer(503, {"error": {"code": 503, "message": "down"}})
        found = re.fullmatch(r"/(upload|download)?/?storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
        assert found, url.path
        resource, content = self.parts(body) if method == "POST" else ({}, b"")
        name = f"{found[2]}/{unquote(found[3]) if found[3] else resource.get('name') or query['name']}"
        with self.server.mutex:
            self.answer(*self.done(method, found[1], name, query, resource, content))

    def done(self, method, kind, name, query, resource, content):
        held = self.server.objects.get(name)
        generation = held[0]["generation"] if held else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            return 412, {"error": {"code": 412, "message": "conditionNotMet"}}
        if method == "POST":
            return 200, self.server.put(name, resource, content)
        if held is None:
            return 404, {"error": {"code": 404, "message": "No such object"}}
        if method == "DELETE":
            del self.server.objects[name]
            return 204, b""
        return (200, held[1]) if kind == "download" else (200, held[0])

    def parts(self, body):
        """Resource and content of a multipart/related body."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        _, first, second, _ = body.split(b"--" + boundary)
        return (json.loads(first.partition(b"\r\n\r\n")[2]), second.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n"))

    def do_GET(self):
        self.handled("GET")

    def do_POST(self):
        self.handled("POST")

    def do_DELETE(self):
        self.handled("DELETE")


@contextlib.contextmanager
def serving():
    """A Bucket that answers."""
    with Bucket() as bucket:
        thread = threading.Thread(target=bucket.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield bucket
        finally:
            bucket.shutdown()
            thread.join()
