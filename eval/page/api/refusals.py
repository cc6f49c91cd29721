"""Errors as OpenAI's clients read them: a status, and a JSON object with a message, a type, the parameter and a code."""

import re
from collections.abc import Sequence

from starlette.responses import JSONResponse

KINDS = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    413: ("invalid_request_error", "too_large"),
    422: ("invalid_request_error", "cannot_be_served"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", "stopped"),
}
"""Status -> type, and the code where the refusal has none of its own."""
URL = re.compile(r"file://[^\s'\"()]*?/?([^\s/'\"()]*)(?=[\s'\"()]|$)")
PLACE = re.compile(r"(?<![\w.:/])/(?:[^\s/:,;'\"()]+/)+([^\s/:,;'\"()]*)")
"""A path of this machine in a sentence; its last part may be told."""


class Refusal(Exception):
    """A request that is not served.

    Args:
        status: of HTTP; one of `KINDS`.
        message: what is wrong, and the way out.
        param: the form's field that is at fault, if it is one.
        code: a word for programs.
        wait: seconds after which it may be tried again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, wait: float | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.wait = status, message, param, code, wait

    def response(self, roots: Sequence[str] = ()) -> JSONResponse:
        """The answer.

        Args:
            roots: folders of this machine, of which it says nothing.
        """
        kind, code = KINDS[self.status]
        said = {
            "message": without_paths(self.message, roots),
            "type": kind,
            "param": self.param,
            "code": self.code or code,
        }
        headers = {"Retry-After": str(max(1, round(self.wait)))} if self.wait else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse({"error": said}, self.status, headers)


def without_paths(text: str, roots: Sequence[str] = ()) -> str:
    """A sentence for others to read: of an absolute path only its last part.

    Args:
        roots: folders whose names are taken out wherever they stand, for a path with a space has no end that can be told.
    """
    for root in sorted(roots, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.-])(?:file://)?{re.escape(root)}(?:/|(?![^\s:,;'\"()]))", "", text)
    return PLACE.sub(r"\1", URL.sub(r"\1", text))
