"""The part of Google's description of the Cloud TPU API, version 2, that `tpu.cloud` needs.

Google's client makes its methods from it. It is here so that nothing must be fetched before the
first request, and a request can be shown without a network.
https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes
https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources
"""

from typing import Any

PAGES = {"pageSize": "integer", "pageToken": "string"}


def _method(verb: str, path: str, query: dict[str, str], body: bool = False) -> dict[str, Any]:
    """Returns the description of a method whose one path parameter is between + and }."""
    name = path.partition("+")[2].partition("}")[0]
    parameters: dict[str, Any] = {
        key: {"location": "query", "type": kind} for key, kind in query.items()
    }
    parameters[name] = {"location": "path", "required": True, "type": "string"}
    method: dict[str, Any] = {
        "httpMethod": verb,
        "path": path,
        "parameters": parameters,
        "parameterOrder": [name],
    }
    method["response"] = {"$ref": "Any"}
    return {**method, "id": f"tpu.{path}.{verb}", **({"request": {"$ref": "Any"}} if body else {})}


def _collection(kind: str, create: dict[str, str], delete: dict[str, str]) -> dict[str, Any]:
    return {
        "methods": {
            "get": _method("GET", "v2/{+name}", {}),
            "list": _method("GET", f"v2/{{+parent}}/{kind}", PAGES),
            "create": _method("POST", f"v2/{{+parent}}/{kind}", create, body=True),
            "delete": _method("DELETE", "v2/{+name}", delete),
        }
    }


_KINDS = {
    "nodes": _collection("nodes", {"nodeId": "string"}, {}),
    "queuedResources": _collection(
        "queuedResources",
        {"queuedResourceId": "string", "requestId": "string"},
        {"force": "boolean", "requestId": "string"},
    ),
    "operations": {
        "methods": {
            "get": _method("GET", "v2/{+name}", {}),
            "list": _method("GET", "v2/{+name}/operations", PAGES),
        }
    },
}
DESCRIPTION: dict[str, Any] = {
    "name": "tpu",
    "version": "v2",
    "rootUrl": "https://tpu.googleapis.com/",
    "servicePath": "",
    "schemas": {"Any": {"id": "Any", "type": "object", "properties": {}}},
    "resources": {"projects": {"resources": {"locations": {"resources": _KINDS}}}},
}
