"""The secrets of alerts, which are in the environment alone."""

import os

from megatron_ext.config import AlertsConfig


def missing_secrets(alerts: AlertsConfig) -> list[str]:
    """A complaint about each environment variable that `alerts` names and that is not set."""
    named: dict[str, str | None] = {}
    if alerts.webhook is not None:
        named["alerts.webhook.url_variable"] = alerts.webhook.url_variable
    if alerts.email is not None:
        named["alerts.email.password_variable"] = alerts.email.password_variable
    return [
        f"{key} = {variable!r}: this environment variable is not set; set it in the job, or remove the section"
        for key, variable in named.items()
        if variable is not None and not os.environ.get(variable)
    ]
