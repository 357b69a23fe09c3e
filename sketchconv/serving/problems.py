"""What a request can be refused for, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any


class Problem(Exception):
    """A refused request.

    Attributes:
        status: HTTP status.
        message: for people.
        param: the member of the body that is wrong, if one is.
        code: for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {
            "error": {
                "message": self.message, "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip


def bad(message: str, param: str | None = None, code: str | None = None) -> Problem:
    """A body that asks for what cannot be: 400."""
    return Problem(400, message, param=param, code=code)
