"""What a user asks Google for, as the API takes it: a TPU VM, at once or through a queued resource.

https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes#Node
https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources#QueuedResource
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu.cloud_api import Api

CREATED_BY = {"created-by": "lamb-tf"}
CREATION = "tpu-creation"  # label: which request made it


@dataclasses.dataclass(frozen=True)
class SliceRequest:
    """A slice as a user asks for it.

    Attributes:
      name: of the TPU VM, and of the queued resource.
      accelerator_type: by Google's name, such as v3-32.
      version: of the runtime, such as tpu-vm-tf-2.19.0-pod-pjrt.
      spot: cheaper, and taken away when Google needs it.
      queued: through a queued resource.
      network: and `subnetwork`, "" for the project's default.
      internal_ips: without addresses outside the network.
      service_account: e-mail address; "" for the project's default.
      labels: of the node.
      metadata: of the node's machines, such as a startup-script.
    """

    name: str
    accelerator_type: str
    version: str
    spot: bool = False
    queued: bool = False
    network: str = ""
    subnetwork: str = ""
    internal_ips: bool = False
    service_account: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def arguments(self, api: Api, creation: str = "") -> tuple[str, dict[str, Any]]:
        """Returns the kind of the request that creates it, and the arguments."""
        node = self._node(creation)
        if not self.queued:
            if self.spot:
                node["schedulingConfig"] = {"spot": True}
            return "nodes", {"parent": api.parent, "nodeId": self.name, "body": node}
        spec = {"parent": api.parent, "nodeId": self.name, "node": node}
        body: dict[str, Any] = {"tpu": {"nodeSpec": [spec]}}
        if self.spot:
            body["spot"] = {}
        return "queuedResources", {
            "parent": api.parent,
            "queuedResourceId": self.name,
            "body": body,
        }

    def _node(self, creation: str) -> dict[str, Any]:
        addresses = {"network": self.network, "subnetwork": self.subnetwork}
        labels = {**self.labels, **CREATED_BY, **({CREATION: creation} if creation else {})}
        node: dict[str, Any] = {
            "acceleratorType": self.accelerator_type,
            "runtimeVersion": self.version,
            "networkConfig": {
                **{key: value for key, value in addresses.items() if value},
                "enableExternalIps": not self.internal_ips,
            },
            "labels": labels,
        }
        if self.service_account:
            node["serviceAccount"] = {"email": self.service_account}
        if self.metadata:
            node["metadata"] = dict(self.metadata)
        return node
