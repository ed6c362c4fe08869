"""A chat's webhook: one POST of {"text": ...} a message, as Slack takes it."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from megatron_ext.monitoring.alerts.message import Message
from megatron_ext.monitoring.alerts.outbox import Refused

_SECONDS = 10
_ABOUT_THE_MESSAGE = (400, 413, 422)
_MARKS = {"info": ":white_check_mark:", "warning": ":warning:", "error": ":x:"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are failures: followed, they become a GET without the message, whose answer says nothing of it."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none."""


_OPENER = urllib.request.build_opener(_NoRedirect)


class Webhook:
    """Sends to `url`, which is a secret: neither errors nor logs name it."""

    name = "the webhook"
    key = "webhook"

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, message: Message) -> None:
        """Post `message`.

        Raises:
            Refused: the server says that the message is wrong.
            ConnectionError: anything else went wrong.
        """
        # What Slack asks to be escaped: https://docs.slack.dev/messaging/formatting-message-text
        title, text = (
            part.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            for part in (message.title, message.text)
        )
        body = json.dumps({"text": f"{_MARKS[message.severity]} *{title}*\n{text}"}).encode()
        failure: Exception | None = None
        try:
            request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
            with _OPENER.open(request, timeout=_SECONDS) as answer:
                answer.read(1)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _ABOUT_THE_MESSAGE:
                failure = Refused(f"HTTP status {error.code}")
            else:
                failure = ConnectionError(f"HTTP status {error.code}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            failure = ConnectionError(_reason(error))
        if failure is not None:
            # Outside of the handlers: what was caught, which may name the URL, is not part of what goes on.
            raise failure


def _reason(error: Exception) -> str:
    """What went wrong, without the text of errors, which may hold the URL."""
    reason = getattr(error, "reason", None)
    fault = reason if isinstance(reason, OSError) else error
    said = getattr(fault, "strerror", None)
    return said if isinstance(said, str) else type(fault).__name__
