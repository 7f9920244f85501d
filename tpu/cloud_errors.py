"""What Google's Cloud TPU API may answer that is no success, in one line, and without credentials."""

import re

SECRET = re.compile(
    r"""(?ix)
    ya29\.[\w.~+/=-]+                                   # an access token of Google's
    | \b1//[\w-]{20,}                                   # a refresh token
    | \bBearer\s+[\w.~+/=-]+
    | -----BEGIN[ ]\w*[ ]?PRIVATE[ ]KEY-----.*?(-----END[ ]\w*[ ]?PRIVATE[ ]KEY-----|$)
    | (?<="access_token":\s")[^"]* | (?<="refresh_token":\s")[^"]*
    """,
    re.DOTALL,
)
HIDDEN = "[credential]"
SHOWN_CHARACTERS = 300


class CloudError(RuntimeError):
    """What was asked for cannot be had; the text is one line with the remedy."""


class NotFoundError(CloudError):
    """There is no such resource."""


class ExistsError(CloudError):
    """There is one of this name already."""


class UsageError(CloudError):
    """The command line makes no sense."""


class WaitedTooLongError(CloudError):
    """It is not there yet, and may come."""


class PassingError(Exception):
    """A trouble that may pass by itself, so that the same request is worth another try.

    Attributes:
      pause: seconds for which the server asks to be left alone.
    """

    def __init__(self, message: str, pause: float = 0.0):
        super().__init__(message)
        self.pause = pause


def without_secrets(text: str, *secrets: str) -> str:
    """Returns a text of someone else's without what looks like a credential, or is one of `secrets`."""
    for secret in filter(None, secrets):
        text = text.replace(secret, HIDDEN)
    return SECRET.sub(HIDDEN, text)


def one_line(text: str, *secrets: str) -> str:
    """Returns the beginning of a text of someone else's as a part of a line, without credentials."""
    line = " ".join(without_secrets(text, *secrets).split())
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "..."
