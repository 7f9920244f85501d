"""Who asks the Cloud TPU API: application default credentials, as all of Google's clients find them.

No credential leaves this file but in the header of a request, over https or to this machine itself.
"""

import importlib.util
import ipaddress
import logging
import os
import urllib.parse
import warnings
from typing import Any

from tpu.cloud_errors import CloudError

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
# TensorFlow's client of gs:// takes the same one.
TOKEN_VARIABLE = "GOOGLE_AUTH_TOKEN_FOR_TESTING"
INSTALL = "pip install -e '.[tpu]' -c constraints.txt"
LOGIN = "gcloud auth application-default login"


def require_client() -> None:
    """Makes sure that the client of Google's APIs is installed.

    Raises:
      CloudError: it is not.
    """
    for package in ("googleapiclient", "httplib2"):
        if importlib.util.find_spec(package) is None:
            raise CloudError(
                f"{package}: expected the client that comes with cloud-tpu-client. Received: none "
                f"installed. Remedy: {INSTALL}"
            )


def plain_http(url: str, timeout: float) -> Any:
    """Returns an httplib2.Http without credentials for the server of a URL."""
    import httplib2

    settings: dict[str, Any] = {"timeout": timeout}
    if _on_this_machine(url):
        settings["proxy_info"] = None  # no proxy leads to what only this machine can see
    http = httplib2.Http(**settings)
    http.follow_redirects = False  # an API does not move; a credential shall not either
    return http


class Credentials:
    """The credentials of this machine's user, looked for when the first request needs them."""

    def __init__(self) -> None:
        self._found: Any = None

    def __repr__(self) -> str:
        return "Credentials()"

    def http(self, url: str, timeout: float) -> Any:
        """Returns an httplib2.Http that signs requests to the server of a URL.

        Raises:
          CloudError: there are no credentials, or they would cross a network in the clear.
        """
        if not url.startswith("https://") and not _on_this_machine(url):
            raise CloudError(
                f"TPU_API_DISCOVERY_URL: expected an API on https, which keeps credentials secret. "
                f"Received: {url}"
            )
        self._found = self._found or _find()
        http = plain_http(url, timeout)
        if hasattr(self._found, "authorize"):  # oauth2client's
            return self._found.authorize(http)
        import google_auth_httplib2

        return google_auth_httplib2.AuthorizedHttp(self._found, http=http)

    def secrets(self) -> tuple[str, ...]:
        """Returns what must not be seen in any text."""
        token = getattr(self._found, "token", None) or getattr(self._found, "access_token", None)
        return tuple(s for s in (token, os.environ.get(TOKEN_VARIABLE)) if isinstance(s, str) and s)


def _find() -> Any:
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if importlib.util.find_spec("google_auth_httplib2") is None:
        return _find_old()
    import google.auth
    import google.oauth2.credentials

    if token:
        return google.oauth2.credentials.Credentials(token)
    # Of projects, of which one is given, and of quotas: the API tells where something is needed.
    logging.getLogger("google.auth").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return google.auth.default(scopes=[SCOPE])[0]
    except Exception as error:  # of the files, of their contents, of the metadata server
        raise no_credentials(error) from None


def _find_old() -> Any:
    """oauth2client, which cloud-tpu-client requires, where google-auth is missing."""
    from oauth2client import client

    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token:
        return client.AccessTokenCredentials(token, "tpu.cloud")
    try:
        return client.GoogleCredentials.get_application_default().create_scoped([SCOPE])
    except Exception as error:
        raise no_credentials(error) from None


def no_credentials(error: Exception) -> CloudError:
    """Says that there are no credentials, and nothing of what an error may quote from them."""
    file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    received = f"{file} (GOOGLE_APPLICATION_CREDENTIALS)" if file else "none that can be used"
    return CloudError(
        f"credentials: expected Google's application default credentials. Received: {received} "
        f"({type(error).__name__}). Remedy: {LOGIN}"
    )


def _on_this_machine(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
