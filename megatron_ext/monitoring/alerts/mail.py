"""E-mail: one mail a message, over SMTP."""

import smtplib
import ssl
from email.message import EmailMessage
from email.utils import formatdate, make_msgid

from megatron_ext.config import EmailConfig
from megatron_ext.monitoring.alerts.message import Message
from megatron_ext.monitoring.alerts.outbox import Refused

_SECONDS = 20


class Mail:
    """Sends through the server of `settings`; neither errors nor logs hold the password."""

    name = "the mail server"
    key = "mail"

    def __init__(self, settings: EmailConfig, password: str | None) -> None:
        self._settings, self._password = settings, password

    def send(self, message: Message) -> None:
        """Send `message` to everybody.

        Raises:
            Refused: the server does not take it from this sender or to any of these recipients.
            ConnectionError: anything else went wrong.
        """
        failure: Exception | None = None
        try:
            with self._connected() as server:
                server.send_message(self._mail(message))
        except (smtplib.SMTPSenderRefused, smtplib.SMTPRecipientsRefused) as error:
            failure = Refused(_reason(error)) if _is_final(error) else ConnectionError(_reason(error))
        except (OSError, ValueError) as error:  # smtplib's errors are OSErrors
            failure = ConnectionError(_reason(error))
        if failure is not None:
            raise failure

    def _connected(self) -> smtplib.SMTP:
        settings = self._settings
        if settings.security == "tls":
            context = ssl.create_default_context()
            server: smtplib.SMTP = smtplib.SMTP_SSL(settings.host, settings.port, timeout=_SECONDS, context=context)
        else:
            server = smtplib.SMTP(settings.host, settings.port, timeout=_SECONDS)
        try:
            if settings.security == "starttls":
                server.starttls(context=ssl.create_default_context())
            if settings.username is not None and self._password is not None:
                server.login(settings.username, self._password)
        except BaseException:
            server.close()
            raise
        return server

    def _mail(self, message: Message) -> EmailMessage:
        mail = EmailMessage()
        mail["Subject"] = " ".join(message.title.split())
        mail["From"], mail["To"] = self._settings.sender, ", ".join(self._settings.recipients)
        mail["Date"], mail["Message-ID"] = formatdate(), make_msgid(domain="megatron-ext.invalid")
        mail.set_content(message.text)
        return mail


def _is_final(error: smtplib.SMTPSenderRefused | smtplib.SMTPRecipientsRefused) -> bool:
    """Whether every code says so: 5xx; 4xx is for another time."""
    codes = (
        [error.smtp_code] if isinstance(error, smtplib.SMTPSenderRefused) else [c for c, _ in error.recipients.values()]
    )
    return all(code >= 500 for code in codes)


def _reason(error: Exception) -> str:
    """What went wrong; of what the server answered, which may repeat what it was sent, the code alone."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return f"it refused the recipients, with {', '.join(str(code) for code, _ in error.recipients.values())}"
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{type(error).__name__}, code {error.smtp_code}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    said = getattr(error, "strerror", None)
    return said if isinstance(said, str) and said else type(error).__name__
