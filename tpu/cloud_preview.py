"""What `tpu.cloud` prints: requests that it does not send, and what the API answers."""

import json
from collections.abc import Iterator
from typing import Any

from tpu.cloud_api import Api
from tpu.cloud_resources import Sight


def lines(api: Api, kind: str) -> Iterator[str]:
    """Yields a line for each TPU VM or queued resource of a zone."""
    for item in api.pages(kind):
        sight = Sight(item, None) if kind == "nodes" else Sight(None, item)
        *_, zone, _, name = ["?"] * 4 + str(item.get("name")).split("/")
        words = [name, zone, sight.said]
        if kind == "nodes":
            words += [str(item.get("acceleratorType")), str(item.get("runtimeVersion"))]
            words.append(f"{sight.num_workers} workers")
            words += ["spot"] if (item.get("schedulingConfig") or {}).get("spot") else []
            words += [str(item[key]) for key in ("health", "createTime") if item.get(key)]
        yield api.clean("  ".join(words))


def show_look(api: Api, name: str) -> None:
    """Prints the requests that look for a slice."""
    for kind in ("queuedResources", "nodes"):
        show(api, kind, "get", name=f"{api.parent}/{kind}/{name}")


def show(api: Api, kind: str, method: str, **arguments: Any) -> None:
    """Prints a request instead of sending it."""
    verb, url, body = api.preview(kind, method, **arguments)
    print(f"{verb} {url}")
    if body is not None:
        print(api.clean(json.dumps(without_metadata(body), indent=2)))


def without_metadata(value: Any) -> Any:
    """Leaves out the metadata of machines, in which keys and start-up scripts stand."""
    if isinstance(value, list):
        return [without_metadata(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: {name: f"[{len(str(text))} characters]" for name, text in item.items()}
        if key == "metadata" and isinstance(item, dict)
        else without_metadata(item)
        for key, item in value.items()
    }
