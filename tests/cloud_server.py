"""Google's Cloud TPU API on this machine, and the fixtures `cloud` and `fake_ssh`.

It answers to the description of the API that it serves itself, written from Google's reference and
not from `tpu/cloud_description.py`. A test says through which states a slice passes and which
requests go wrong, and reads what was asked.
"""

import collections
import http.server
import json
import pathlib
import re
import shlex
import threading
import time
import uuid
from urllib.parse import parse_qs, urlsplit

import pytest

TOKEN = "ya29.a0-never-to-be-seen"
PARENT = "projects/proj/locations/us-central1-a"
Request = collections.namedtuple("Request", "method path query body")


class Cloud:
    """The API: resources by their path, faults to come, requests that came."""

    def __init__(self):
        self.resources = {}
        self.states = {}  # by the last part of the path: states to pass through, or a function
        self.operations = []
        self.faults = []
        self.requests = []
        self.token = TOKEN
        self.page_size = 2
        self.lock = threading.RLock()

    def fail(self, method, path, *answer, times=1):
        """The next `times` requests whose path matches are answered so: status, body, headers, delay."""
        self.faults.append([method, path, answer, times])

    def asked(self, method, path=""):
        return [r for r in self.requests if r.method == method and re.search(path, r.path)]

    def add_node(self, name, *states, workers=1, **more):
        path = f"{PARENT}/nodes/{name}"
        endpoints = [{"ipAddress": f"10.0.0.{i}", "port": 8470} for i in range(workers)]
        node = {
            "name": path,
            "id": uuid.uuid4().hex,
            "acceleratorType": "v3-8",
            "runtimeVersion": "tf",
        }
        self.resources[path] = {**node, "networkEndpoints": endpoints, **more}
        self.states.setdefault(name, collections.deque(states or ["READY"]))

    def state(self, name):
        states = self.states[name]
        if callable(states):
            return states()
        return states.popleft() if len(states) > 1 else states[0]

    def take_fault(self, method, path):
        for fault in self.faults:
            if fault[3] and fault[0] == method and re.search(fault[1], path):
                fault[3] -= 1
                return fault[2]
        return None

    def answer(self, method, path, query, body):
        """Returns status and body, as Google would."""
        last = path.rpartition("/")[2]
        if method == "POST" and last in ("nodes", "queuedResources"):
            return self._create(path, query, body)
        if method == "GET" and last in ("nodes", "queuedResources"):
            return self._list(path, query)
        if method == "GET" and last == "operations":
            return 200, {"operations": self.operations}
        if path not in self.resources:
            return 404, {"error": {"code": 404, "message": f"Resource '{path}' was not found"}}
        if method == "DELETE":
            return self._delete(path, query)
        return 200, self._shown(path)

    def _create(self, path, query, body):
        name = query.get("nodeId") or query.get("queuedResourceId")
        if f"{path}/{name}" in self.resources:
            return 409, {"error": {"code": 409, "message": "Resource already exists"}}
        if path.endswith("nodes"):
            self.states.setdefault(name, collections.deque(["CREATING", "READY"]))
            self.add_node(name, **body)
        else:
            self.resources[f"{path}/{name}"] = {**body, "name": f"{path}/{name}"}
            self.states.setdefault(
                name, collections.deque(["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
            )
        return 200, {"name": f"{PARENT}/operations/{name}", "done": False}

    def _list(self, path, query):
        found = sorted(p for p in self.resources if p.rpartition("/")[0] == path)
        start = int(query.get("pageToken", 0))
        end = start + self.page_size
        page = {path.rpartition("/")[2]: [self._shown(p) for p in found[start:end]]}
        return 200, {**page, **({"nextPageToken": str(end)} if end < len(found) else {})}

    def _delete(self, path, query):
        resource = self.resources.pop(path)
        if "queuedResources" in path:
            assert query.get("force") == "true"
            for spec in resource["tpu"]["nodeSpec"]:
                self.resources.pop(f"{spec['parent']}/nodes/{spec['nodeId']}", None)
        self.states.pop(path.rpartition("/")[2], None)
        return 200, {"name": f"{PARENT}/operations/delete", "done": True}

    def _shown(self, path):
        name = path.rpartition("/")[2]
        resource = dict(self.resources[path])
        queued = f"{PARENT}/queuedResources/{name}"
        if "queuedResources" not in path:
            # The node of a queued resource shows its own state under "NAME/node".
            resource["state"] = self.state(f"{name}/node" if queued in self.resources else name)
            return resource
        resource["state"] = {"state": self.state(name)}
        if resource["state"]["state"] == "ACTIVE":
            (spec,) = resource["tpu"]["nodeSpec"]
            self.states.setdefault(f"{name}/node", collections.deque(["CREATING", "READY"]))
            if f"{PARENT}/nodes/{name}" not in self.resources:
                self.add_node(name, queuedResource=queued, **spec["node"])
        return resource


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self):
        cloud, url = self.server.cloud, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if url.path == "/discovery":
            return self._send(200, json.dumps(description(f"http://{self.headers['Host']}/")))
        path = url.path.removeprefix("/v2/")
        query = {key: value[0] for key, value in parse_qs(url.query).items()}
        with cloud.lock:
            is_json = "json" in self.headers.get("Content-Type", "")
            request = Request(self.command, path, query, json.loads(body) if is_json else body)
            cloud.requests.append(request)
            fault = cloud.take_fault(self.command, path)
            signed = self.headers.get("Authorization") == f"Bearer {cloud.token}"
            if fault is None and not signed:
                fault = 401, {"error": {"message": "Request had invalid credentials"}}
            if fault is None:
                fault = cloud.answer(self.command, path, query, request.body)
        status, content, headers, delay = (*fault, *({}, 0)[len(fault) - 2 :])
        if delay:
            time.sleep(delay)
        if status is None:  # the connection breaks
            self.close_connection = True
            return None
        return self._send(
            status, content if isinstance(content, str) else json.dumps(content), headers
        )

    do_GET = do_POST = do_DELETE = _serve

    def _send(self, status, content, headers=()):
        content = content.replace("$AUTHORIZATION", str(self.headers.get("Authorization"))).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def description(root):
    """The API's description, with Google's own ids and patterns, as far as it is used."""

    def method(name, verb, path, pattern, request=None, **query):
        (parameter,) = re.findall(r"\+(\w+)", path)
        place = {"location": "path", "pattern": pattern, "required": True, "type": "string"}
        found = {
            "id": f"tpu.projects.locations.{name}",
            "path": path,
            "httpMethod": verb,
            "parameters": {
                **{key: {"location": "query", "type": kind} for key, kind in query.items()},
                parameter: place,
            },
            "parameterOrder": [parameter],
            "response": {"$ref": "Thing"},
            "scopes": ["https://www.googleapis.com/auth/cloud-platform"],
        }
        return {**found, "request": {"$ref": request}} if request else found

    zone = "^projects/[^/]+/locations/[^/]+$"
    pages = {"pageSize": "integer", "pageToken": "string"}
    made = {"nodes": {"nodeId": "string"}, "queuedResources": {"queuedResourceId": "string"}}
    resources = {}
    for kind, created in made.items():
        one = zone[:-1] + f"/{kind}/[^/]+$"
        force = {"force": "boolean"} if kind == "queuedResources" else {}
        resources[kind] = {
            "methods": {
                "get": method(f"{kind}.get", "GET", "v2/{+name}", one),
                "list": method(f"{kind}.list", "GET", f"v2/{{+parent}}/{kind}", zone, **pages),
                "create": method(
                    f"{kind}.create", "POST", f"v2/{{+parent}}/{kind}", zone, "Thing", **created
                ),
                "delete": method(f"{kind}.delete", "DELETE", "v2/{+name}", one, **force),
            }
        }
    listed = method("operations.list", "GET", "v2/{+name}/operations", zone, **pages)
    resources["operations"] = {"methods": {"list": listed}}
    return {
        "id": "tpu:v2",
        "name": "tpu",
        "version": "v2",
        "rootUrl": root,
        "servicePath": "",
        "auth": {"oauth2": {"scopes": {"https://www.googleapis.com/auth/cloud-platform": {}}}},
        "schemas": {"Thing": {"id": "Thing", "type": "object", "properties": {}}},
        "resources": {"projects": {"resources": {"locations": {"resources": resources}}}},
    }


@pytest.fixture
def cloud(monkeypatch):
    """An API with nothing in it, to which TPU_API_DISCOVERY_URL leads; no pause is long."""
    from tpu import cloud_api, cloud_resources, supervisor

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that waits no longer
    server.cloud = Cloud()
    server.cloud.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("TPU_API_DISCOVERY_URL", f"{server.cloud.address}/discovery")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", TOKEN)
    monkeypatch.setattr(cloud_api, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(cloud_resources, "LOOK_SECONDS", 0.01)
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE", "FIRST_SCARCE_PAUSE", "LONGEST_SCARCE_PAUSE"):
        monkeypatch.setattr(supervisor, f"{name}_SECONDS", 0.01)
    yield server.cloud
    server.shutdown()
    server.server_close()


class FakeSsh:
    """A program in the place of ssh that runs the command on this machine and notes it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._log = folder / "ssh.log"
        program = folder / "ssh"
        program.write_text(
            f'#!/bin/sh\nprintf "%s\\t%s\\0" "$1" "$2" >> {shlex.quote(str(self._log))}\n'
            'export WORKER="$1"\nexec sh -c "$2"\n'
        )
        program.chmod(0o755)
        self.flag = f"--ssh_command={program} {{worker}} {{command}}"

    def calls(self) -> list[tuple[int, str]]:
        """Returns worker and command of each connection."""
        if not self._log.exists():
            return []
        records = (record.split("\t", 1) for record in self._log.read_text().split("\0") if record)
        return [(int(worker), command) for worker, command in records]

    def script(self, *statuses: int) -> str:
        """Returns a command that ends with these statuses, one after the other, then with the last."""
        (self.folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        program = self.folder / "train"
        program.write_text(
            f"cd {shlex.quote(str(self.folder))}\necho run >> runs\nread status < statuses\n"
            "[ $(wc -l < statuses) -gt 1 ] && sed -i 1d statuses\nexit $status\n"
        )
        return f"sh {program}"

    def runs(self) -> int:
        """Returns how often the command of `script` was started."""
        file = self.folder / "runs"
        return len(file.read_text().split()) if file.exists() else 0


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch):
    """See `FakeSsh`; sessions of other tests are not this one's."""
    from tpu import remote

    monkeypatch.setattr(remote, "SESSION_FOLDER", str(tmp_path))
    return FakeSsh(tmp_path)
