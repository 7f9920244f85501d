"""Google's Cloud TPU API, version 2, which alone knows queued resources: requests, and their retries.

The client of Google's that cloud-tpu-client brings makes methods from a description of the API:
that of `tpu.cloud_description`, or, as for cloud_tpu_client, the one at TPU_API_DISCOVERY_URL.
"""

import email.utils
import http.client
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tpu import cloud_credentials
from tpu.cloud_description import DESCRIPTION
from tpu.cloud_errors import (
    CloudError,
    ExistsError,
    NotFoundError,
    PassingError,
    one_line,
    without_secrets,
)

DISCOVERY_VARIABLE = "TPU_API_DISCOVERY_URL"
PATIENCE_SECONDS = 60.0  # for one request with all its retries
ANSWER_SECONDS = 30.0  # for one answer
FIRST_PAUSE_SECONDS = 1.0  # doubled from try to try
LONGEST_PAUSE_SECONDS = 60.0
PAGE_SIZE = 500
RATE_REASONS = ("rateLimitExceeded", "userRateLimitExceeded", "RATE_LIMIT_EXCEEDED")


class Api:
    """Requests about the TPUs of one project in one zone."""

    def __init__(self, project: str, zone: str, patience: float = PATIENCE_SECONDS):
        """Makes no request.

        Args:
          project: Google Cloud project.
          zone: zone such as us-central1-a; "-" for all, in lists.
          patience: seconds after which a request that meets passing troubles is given up.
        """
        cloud_credentials.require_client()
        # It quotes bodies of answers in its warnings.
        logging.getLogger("googleapiclient").setLevel(logging.CRITICAL)
        self.project = project
        self.zone = zone
        self.patience = patience
        self.tries = 0  # of the last request
        self._credentials = cloud_credentials.Credentials()
        self._description: dict[str, Any] | None = None
        self._service: Any = None

    @property
    def parent(self) -> str:
        """The name of the zone in requests."""
        return f"projects/{self.project}/locations/{self.zone}"

    def call(self, kind: str, method: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request until it is answered.

        Args:
          kind: nodes, queuedResources or operations.
          method: get, list, create or delete.
          **arguments: of the method.

        Raises:
          NotFoundError, ExistsError: as the names say.
          CloudError: any other answer that another try would not change, or no patience left.
        """
        what = f"{method} {arguments.get('name') or arguments.get('parent')}"
        started, pause, self.tries = time.monotonic(), FIRST_PAUSE_SECONDS, 0
        while True:
            left = max(self.patience - (time.monotonic() - started), 0.1)
            self.tries += 1
            try:
                return self._once(kind, method, arguments, what, min(ANSWER_SECONDS, left))
            except PassingError as trouble:
                wait = max(pause, trouble.pause)
                if time.monotonic() - started + wait > self.patience:
                    asked = f", which asks for {trouble.pause:.0f} s" if trouble.pause else ""
                    raise CloudError(
                        f"{what}: no success in {self.tries} tries within {self.patience:.0f} s: "
                        f"{trouble}{asked}. Remedy: try again later, or with a longer --timeout"
                    ) from None
                print(f"{what}: {trouble}; again in {wait:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def pages(self, kind: str) -> Iterator[dict[str, Any]]:
        """Yields all resources of a kind in the zone."""
        token = None
        while True:
            page = self.call(kind, "list", parent=self.parent, pageSize=PAGE_SIZE, pageToken=token)
            yield from (item for item in page.get(kind) or () if isinstance(item, dict))
            for place in page.get("unreachable") or ():
                print(f"Warning: {place} could not be reached", file=sys.stderr, flush=True)
            token = page.get("nextPageToken")
            if not token:
                return

    def preview(self, kind: str, method: str, **arguments: Any) -> tuple[str, str, Any]:
        """Returns method, URL and body of a request that is not sent."""
        service = _build(DESCRIPTION, cloud_credentials.plain_http("", ANSWER_SECONDS))
        request = _request(service, kind, method, arguments)
        return request.method, request.uri, json.loads(request.body) if request.body else None

    def clean(self, text: str) -> str:
        """Returns a text of the server's without credentials."""
        return without_secrets(text, *self._credentials.secrets())

    def _once(self, kind: str, method: str, arguments: dict, what: str, seconds: float) -> dict:
        """Sends a request once."""
        from googleapiclient.errors import HttpError

        def send() -> Any:
            return _request(self._connected(), kind, method, arguments).execute()

        try:
            answer = _bounded(send, seconds)
        except (CloudError, PassingError):
            raise
        except HttpError as error:
            raise self._refusal(error, what) from None
        except TimeoutError:
            self._service = None  # its connection is still in use
            raise PassingError(f"no answer within {seconds:.0f} s") from None
        except ValueError:
            raise PassingError("the answer is not JSON") from None
        except Exception as error:  # of sockets, of httplib2, of two packages for credentials
            self._service = None
            raise self._failure(error, what) from None
        if not isinstance(answer, dict):
            raise PassingError("the answer is not a JSON object")
        return answer

    def _connected(self) -> Any:
        if self._service is None:
            if self._description is None:
                self._description = _description()
            root = str(self._description["rootUrl"])
            http_object = self._credentials.http(root, ANSWER_SECONDS)
            self._service = _build(self._description, http_object)
        return self._service

    def _failure(self, error: Exception, what: str) -> Exception:
        """Turns an exception of a connection into one of ours."""
        name = type(error).__name__
        cause = error.__cause__ or error.__context__
        if name in ("RefreshError", "HttpAccessTokenRefreshError", "AccessTokenCredentialsError"):
            if type(cause).__name__ != "TransportError":
                return cloud_credentials.no_credentials(error)
        elif not isinstance(error, OSError | http.client.HTTPException):
            import httplib2

            if not isinstance(error, httplib2.HttpLib2Error) and name != "TransportError":
                text = one_line(str(error), *self._credentials.secrets())
                return CloudError(f"{what}: the request failed ({name}: {text})")
        text = one_line(str(error), *self._credentials.secrets())
        return PassingError(f"no connection ({name}: {text})")

    def _refusal(self, error: Any, what: str) -> Exception:
        """Turns an answer that is an error into one of ours."""
        status = int(error.resp.status)
        message, reasons = _message(error.content)
        text = one_line(message or str(error.resp.reason), *self._credentials.secrets())
        limited = status == 403 and any(reason in RATE_REASONS for reason in reasons)
        if status in (408, 429) or status >= 500 or limited:
            return PassingError(f"{status} {text}", _retry_after(error.resp.get("retry-after")))
        said = f"{what}: the API answers {status} ({text}). Remedy: "
        if status == 401:
            return CloudError(f"{said}new credentials: {cloud_credentials.LOGIN}")
        if status == 403:
            if "SERVICE_DISABLED" in reasons or "accessNotConfigured" in reasons:
                enable = f"gcloud services enable tpu.googleapis.com --project={self.project}"
                return CloudError(f"{said}{enable}")
            return CloudError(
                f"{said}check --project={self.project}, and give the account that you use the role "
                "roles/tpu.admin (roles/tpu.viewer to look only) there"
            )
        if status == 404:
            return NotFoundError(
                f"{said}check the name, --zone={self.zone} and --project={self.project}; `python -m "
                f"tpu.cloud list --zone={self.zone} --project={self.project}` shows what there is"
            )
        if status == 409:
            return ExistsError(f"{said}another name, or delete what has it")
        if 300 <= status < 400:
            return CloudError(f"{said}check {DISCOVERY_VARIABLE}; an API does not redirect")
        return CloudError(f"{said}mend what the answer names")


def _bounded(function: Callable[[], Any], seconds: float) -> Any:
    """Calls a function; a server that answers byte by byte, or a name server, takes no longer."""
    results: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((function(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=work, name="TPU API", daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def _message(content: bytes) -> tuple[str, list[str]]:
    """Returns the message and the reasons in the body of an error."""
    try:
        found = json.loads(content)
        found = found[0] if isinstance(found, list) else found
        error = found["error"]
        details = [*error.get("errors", ()), *error.get("details", ())]
        reasons = [str(d.get("reason")) for d in details if isinstance(d, dict)]
        return str(error["message"]), reasons
    except (ValueError, LookupError, TypeError, AttributeError):
        return "", []


def _retry_after(value: str | None) -> float:
    """Returns the seconds that a header asks for, 0 where it asks for none."""
    try:
        return max(float(value or 0), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(str(value)).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def _request(service: Any, kind: str, method: str, arguments: dict[str, Any]) -> Any:
    collection = getattr(service.projects().locations(), kind)()
    return getattr(collection, method)(**arguments)


def _build(description: dict[str, Any], http_object: Any) -> Any:
    from googleapiclient import discovery

    return discovery.build_from_document(description, http=http_object)


def _description() -> dict[str, Any]:
    """Returns the description of the API, fetched where an address for it is given."""
    address = os.environ.get(DISCOVERY_VARIABLE)
    if not address:
        return DESCRIPTION
    url = address.replace("{api}", "tpu").replace("{apiVersion}", "v2")
    response, content = cloud_credentials.plain_http(url, ANSWER_SECONDS).request(url)
    if response.status == 429 or response.status >= 500:
        raise PassingError(f"{response.status} from {DISCOVERY_VARIABLE}")
    try:
        found = json.loads(content)
        found["resources"]["projects"]["resources"]["locations"]["resources"]["queuedResources"]
        if response.status == 200 and found["rootUrl"] and "servicePath" in found:
            return found
    except (ValueError, LookupError, TypeError):
        pass
    raise CloudError(
        f"{DISCOVERY_VARIABLE}={address.partition('?')[0]}: expected the description of an API that knows queued "
        f"resources, version v2. Received: {response.status} without one. Remedy: unset it"
    )
