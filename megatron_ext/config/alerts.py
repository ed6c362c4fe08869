"""Who is told of what happens to a run: a chat's webhook, e-mail, Weights & Biases."""

from typing import Literal, get_args

from pydantic import Field

from megatron_ext.config.base import config

AlertKind = Literal[
    "started",
    "finished",
    "stopped",
    "failed",
    "nonfinite",
    "spike",
    "skip",
    "rollback",
    "guard_stop",
    "lever",
    "stall",
    "slow_rank",
    "lost_rank",
    "disk",
    "checkpoint",
    "checkpoint_failed",
    "checkpoint_copied",
    "evaluation",
    "evaluation_failed",
    "gradients",
    "stage",
]
"""Kinds of events that people can be told of."""

_EVERYDAY = ("lever", "checkpoint", "checkpoint_copied", "evaluation", "gradients", "stage")
_USUAL: tuple[AlertKind, ...] = tuple(kind for kind in get_args(AlertKind) if kind not in _EVERYDAY)


@config
class WebhookConfig:
    """A webhook that takes what Slack's take, {"text": ...}: Slack, Mattermost, Rocket.Chat, Google Chat."""

    url_variable: str = Field(min_length=1)
    """Name of the environment variable that holds the URL, which is a secret."""


@config
class EmailConfig:
    """A mail server (SMTP)."""

    host: str = Field(min_length=1)
    """Its name or address."""
    port: int = Field(default=587, ge=1, le=65535)
    """Its port: usually 587 with starttls, 465 with tls, 25 with none."""
    security: Literal["starttls", "tls", "none"] = "starttls"
    """How the connection is encrypted; the server's certificate is checked."""
    username: str | None = None
    """Who logs in. Unset: nobody does."""
    password_variable: str | None = None
    """Name of the environment variable that holds the password."""
    sender: str = Field(min_length=1)
    """Address that the mail is from."""
    recipients: list[str] = Field(min_length=1)
    """Addresses that it goes to."""


@config
class AlertsConfig:
    """Who is told of what happens to a run. Sending never waits for the network in a training step."""

    events: list[AlertKind] = Field(default_factory=lambda: list[AlertKind](_USUAL))
    """What is told of. Everything that happens is in the metrics file anyway."""
    repeat_seconds: float = Field(default=300.0, ge=0)
    """Of one kind of event, one message at most in this time. What comes within it is counted and told together in the
    next one."""
    webhook: WebhookConfig | None = None
    """A chat's webhook. Unset: none."""
    email: EmailConfig | None = None
    """E-mail. Unset: none."""
    wandb: bool = False
    """As alerts of the W&B run too; needs logging.wandb."""
