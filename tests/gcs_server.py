"""Cloud Storage on this machine, for TensorFlow's own gs:// client, and the fixture `gcs`.

TensorFlow has no setting for another endpoint, but its libcurl obeys HTTPS_PROXY and
CURL_CA_BUNDLE. So the server is a proxy that ends TLS for Google's two host names with a
certificate of its own, and answers with gcp-storage-emulator. It is a process of its own: some of
TensorFlow's file calls hold Python's lock while they wait. Its standard input and output are the
channel on which tests control it; it ends when that closes, so also when the tests are killed.
"""

import base64
import collections
import functools
import http.server
import io
import json
import logging
import os
import pathlib
import re
import ssl
import subprocess
import sys
import tempfile
import threading
from urllib.parse import parse_qs, unquote, urlsplit

import gcp_storage_emulator.server as emulator
import pytest
import trustme
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

ROOT = pathlib.Path(__file__).parents[1]
HOSTS = ("www.googleapis.com", "storage.googleapis.com")
# What a request asks for, by method and path: (action, permission on the bucket).
ACTIONS = [
    ("GET", r"/storage/v1/b/(?P<bucket>[^/]+)", "bucket", "storage.buckets.get"),
    ("GET", r"/storage/v1/b/(?P<bucket>[^/]+)/o", "list", "storage.objects.list"),
    ("GET", r"/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)", "stat", "storage.objects.get"),
    ("DELETE", r"/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)", "delete", "storage.objects.delete"),
    (
        "POST",
        r"/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)/rewriteTo/b/(?P<to_bucket>[^/]+)/o/(?P<to_name>[^/]+)",
        "rewrite",
        "storage.objects.get",
    ),
    ("POST", r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o", "create", "storage.objects.create"),
    ("PUT", r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o", "upload", None),
    ("GET", r"/(?P<bucket>[^/]+)/(?P<name>[^/]+)", "read", "storage.objects.get"),
]  # fmt: skip
Request = collections.namedtuple("Request", "method action bucket name status")


class Handler(emulator.RequestHandler):
    """A connection: CONNECT, then requests to one of Google's hosts."""

    protocol_version = "HTTP/1.1"  # answers "Expect: 100-continue"
    disable_nagle_algorithm = True

    def __init__(self, *args):
        self.status = 0
        super().__init__(args[-1].storage, *args)

    def do_CONNECT(self):
        host, port = self.path.split(":")
        if host not in HOSTS or port != "443":
            self.server.log.append(Request("CONNECT", "refused", "", self.path, 403))
            self.send_error(403)
            return
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", 0)

    def do_GET(self):
        body, connection = self._body(), self.wfile
        with self.server.lock:  # the emulator is made for one request at a time
            self.rfile, before = io.BytesIO(body), self.rfile
            self._answer(body)
            self.rfile = before
        connection.write(self.wfile.getvalue())
        self.wfile = connection

    do_POST = do_PUT = do_DELETE = do_GET

    def _body(self) -> bytes:
        # TensorFlow sends both headers with an upload; chunked wins.
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        del self.headers["Content-Length"], self.headers["Transfer-Encoding"]
        self.headers["Content-Length"] = str(len(body))
        return body

    def _answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        action, permission, place = _action(self.command, url.path)
        if action in ("create", "upload"):
            place["name"] = query["name"]
        faults, self.wfile = self.server.faults, io.BytesIO()
        # By kind, so that some of each fail whatever else is asked for in between.
        self.server.counts[action] += 1
        fails = faults["every"] and self.server.counts[action] % faults["every"] == 0
        if fails and not faults["after"]:
            self._refuse(503, "Backend Error")
        elif not self._is_refused(action, permission, place):
            self._do(action, place, query, body)
            if fails:
                self.wfile = io.BytesIO()
                self._refuse(503, "Backend Error")
        bucket, name = place.get("bucket", ""), place.get("name", query.get("prefix", ""))
        self.server.log.append(Request(self.command, action, bucket, name, self.status))

    def _is_refused(self, action: str, permission: str | None, place: dict[str, str]) -> bool:
        """Answers as Google does where a bucket, an object or a permission is missing."""
        storage = self.server.storage
        needed = [(place.get("bucket"), permission)]
        target = (
            place.get("to_bucket", place.get("bucket")),
            place.get("to_name", place.get("name")),
        )
        if action == "rewrite":
            needed.append((target[0], "storage.objects.create"))
        if action in ("rewrite", "create") and target[1] in storage.objects.get(target[0], {}):
            needed.append((target[0], "storage.objects.delete"))  # it is overwritten
        is_there = place.get("name") in storage.objects.get(place.get("bucket"), {})
        is_missing = action in ("read", "stat", "delete", "rewrite") and not is_there
        if is_missing and self._denied(place["bucket"], "storage.objects.list"):
            self._forbid(permission)  # who may not list is not told what is not there
            return True
        for bucket, permission in needed:
            if bucket not in storage.buckets:
                self._refuse(404, "The specified bucket does not exist.")
                return True
            if permission and self._denied(bucket, permission):
                self._forbid(permission)
                return True
        if is_missing:
            self._refuse(404, f"No such object: {place['bucket']}/{place['name']}")
            return True
        return False

    def _denied(self, bucket: str, permission: str) -> bool:
        denied = self.server.faults["denied"]
        return [bucket, permission] in denied or ["", permission] in denied

    def _forbid(self, permission: str) -> None:
        kind = "bucket" if "buckets" in permission else "object"
        self._refuse(
            403,
            f"tests@project.iam.gserviceaccount.com does not have {permission} access to the Google "
            f"Cloud Storage {kind}. Permission '{permission}' denied on resource (or it may not exist).",
        )

    def _refuse(self, status: int, message: str) -> None:
        if self.headers["Host"] == "storage.googleapis.com":
            code = {403: "AccessDenied", 404: "NoSuchKey", 503: "ServiceUnavailable"}[status]
            body = (
                f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code>"
                f"<Message>Refused.</Message><Details>{message}</Details></Error>"
            )
        else:
            errors = [{"message": message, "domain": "global", "reason": "forbidden"}]
            error = {"code": status, "message": message, "errors": errors}
            body = json.dumps({"error": error}, indent=2)
        self._reply(status, body.encode())

    def _reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _do(self, action: str, place: dict[str, str], query: dict[str, str], body: bytes) -> None:
        """Does what the request asks for; by itself where the emulator departs from Google."""
        storage = self.server.storage
        is_there = place.get("name") in storage.objects.get(place["bucket"], {})
        if action == "list":
            self._list(place["bucket"], query)
        elif action == "create" and query.get("ifGenerationMatch") == "0" and is_there:
            self._refuse(412, "At least one of the pre-conditions you specified did not hold.")
        elif action == "upload" and self.headers.get("Content-Range", "").startswith("bytes */"):
            received = storage.get_resumable_byte_count(query["upload_id"])
            if query["upload_id"] not in storage.resumable:
                self._reply(200, b"{}")  # whole
            elif received:
                self._reply(308, b"", Range=f"bytes=0-{received - 1}")
            else:
                self._reply(308, b"")
        else:
            emulator.Router(self).handle(self.command)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found = {}  # in the order of the names, both kinds
        for name in sorted(self.server.storage.objects.get(bucket, {})):
            if name.startswith(prefix):
                head, slash, _ = name[len(prefix) :].partition(delimiter or "\n")
                found[prefix + head + slash] = "prefixes" if slash else "items"
        start, size = int(query.get("pageToken", 0)), self.server.faults["page"]
        size = min(size, int(query.get("maxResults", size)))
        page = list(found.items())[start : start + size]
        answer = {
            "kind": "storage#objects",
            "items": [{"name": name} for name, kind in page if kind == "items"],
            "prefixes": [name for name, kind in page if kind == "prefixes"],
        }
        if start + size < len(found):
            answer["nextPageToken"] = str(start + size)
        self._reply(200, json.dumps({k: v for k, v in answer.items() if v}).encode())

    def send_response(self, code, message=None):
        self.status = int(code)
        super().send_response(code, message)

    def send_header(self, keyword, value):
        if keyword == "Location":  # of an upload; the emulator thinks that it speaks plain HTTP
            value = value.replace("http://", "https://", 1)
        super().send_header(keyword, value)


def _action(method: str, path: str) -> tuple[str, str | None, dict[str, str]]:
    for wanted, pattern, action, permission in ACTIONS:
        if wanted == method and (match := re.fullmatch(pattern, path)):
            return action, permission, {k: unquote(v) for k, v in match.groupdict().items()}
    raise ValueError(f"TensorFlow asks for something new: {method} {path}")


class Server(http.server.ThreadingHTTPServer):
    """The storage, what goes wrong with it, and what was asked of it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: str):
        super().__init__(("127.0.0.1", 0), Handler)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(f"{folder}/authority.pem")
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*HOSTS).configure_cert(self.tls)
        self.storage = Storage(use_memory_fs=True)
        self.storage._write_config_to_file = lambda: None  # all of it anew at each request
        self.lock = threading.Lock()
        self.reset()

    def handle_error(self, request, client_address):
        """Keeps quiet about connections that the client has cut."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    # What the tests may call.

    def reset(self) -> None:
        self.faults = {"every": 0, "after": False, "denied": [], "page": 1000}
        self.log: list[Request] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def make_bucket(self, name: str) -> None:
        buckets.create_bucket(name, self.storage)
        self.storage.buckets[name]["softDeletePolicy"] = {"retentionDurationSeconds": "0"}

    def set_faults(self, faults: dict) -> None:
        self.faults.update(faults)

    def requests(self) -> list[Request]:
        return self.log

    def names(self, bucket: str) -> list[str]:
        return sorted(self.storage.objects.get(bucket, {}))

    def content(self, bucket: str, name: str) -> str:
        return base64.b64encode(self.storage.get_file(bucket, name)).decode()


def serve() -> None:
    """The server process: obeys one JSON line after the other until the tests are gone."""
    logging.disable(logging.CRITICAL)
    plain_data = emulator._read_data

    def data(handler, query):
        value = plain_data(handler, query)
        # The marker of a folder is an empty upload.
        return b"" if value is None and "media" in query.get("uploadType", []) else value

    emulator._read_data = data
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(json.dumps([server.server_port, f"{folder}/authority.pem"]), flush=True)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            with server.lock:
                print(json.dumps(getattr(server, name)(*arguments)), flush=True)


class Gcs:
    """Control of the server, which starts with the object.

    Attributes:
      bucket: gs:// path of a bucket that is this test's own.
    """

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gcs_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        port, authority = json.loads(self._process.stdout.readline())
        # In lower case gRPC would obey it as well, and workers on one machine would not meet.
        for name in ("https_proxy", "no_proxy", "NO_PROXY"):
            os.environ.pop(name, None)
        os.environ.update(
            HTTPS_PROXY=f"http://127.0.0.1:{port}",
            CURL_CA_BUNDLE=authority,
            GOOGLE_AUTH_TOKEN_FOR_TESTING="token",
            NO_GCE_CHECK="true",
        )
        self._buckets = 0

    def _call(self, *line):
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def reset(self) -> None:
        """Ends all faults, forgets the requests, and makes a new bucket."""
        self._call("reset")
        self._buckets += 1
        self.bucket = self.make_bucket(f"bucket-{self._buckets}")

    def make_bucket(self, name: str) -> str:
        """Makes an empty bucket; returns its gs:// path."""
        self._call("make_bucket", name)
        return f"gs://{name}"

    def fail_every(self, count: int, after: bool = False) -> None:
        """Answers each `count`-th request with 503, `after` it has been done or without."""
        self._call("set_faults", {"every": count, "after": after})

    def deny(self, *permissions: str, bucket: str = "") -> None:
        """Takes permissions on a bucket away, or on all of them; no permissions: gives all back."""
        name = bucket.removeprefix("gs://")
        self._call("set_faults", {"denied": [[name, permission] for permission in permissions]})

    def page_size(self, size: int) -> None:
        """Puts at most so many names into one answer to a listing."""
        self._call("set_faults", {"page": size})

    def requests(self) -> list[Request]:
        """Returns what was asked since the last reset: method, action, bucket, name, status."""
        return [Request(*values) for values in self._call("requests")]

    def names(self, path: str) -> list[str]:
        """Returns the names of the objects in a bucket that begin with the rest of the path."""
        bucket, _, prefix = path.removeprefix("gs://").partition("/")
        return [name for name in self._call("names", bucket) if name.startswith(prefix)]

    def content(self, path: str) -> bytes:
        """Returns what an object holds, without TensorFlow and its caches."""
        bucket, _, name = path.removeprefix("gs://").partition("/")
        return base64.b64decode(self._call("content", bucket, name))


@functools.cache
def _started() -> Gcs:
    return Gcs()


@pytest.fixture
def gcs() -> Gcs:
    """The server of this process, started when first needed, with a new bucket."""
    server = _started()
    server.reset()
    return server


if __name__ == "__main__":
    serve()
