"""Rules of alerts."""

from typing import Any

from megatron_ext.config.rules.registry import rule


@rule("alerts.wandb", "logging.wandb.mode")
def _alerts_need_their_run(alerts: bool, mode: str) -> str | None:
    if alerts and mode == "off":
        return "there is no W&B run to alert by; set logging.wandb.mode: online, or alerts.wandb: false"
    return None


@rule(given=("alerts.email",))
def _mail_logs_in_safely(email: Any) -> str | None:
    if email is None:
        return None
    user, variable = f"alerts.email.username = {email.username!r}", email.password_variable
    if (email.username is None) != (variable is None):
        return f"{user}, alerts.email.password_variable = {variable!r}: set both, or neither"
    if email.username is not None and email.security == "none":
        return f"{user}, alerts.email.security = 'none': the password would travel in clear; set starttls or tls"
    return None
