"""Alerts reach a real HTTP and a real mail server, never more often than asked, never twice, and name no secret."""

import json
import logging
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import AlertsConfig, EmailConfig, WebhookConfig, dump_yaml, load_run
from megatron_ext.config.load import read_run_text
from megatron_ext.errors import ConfigError
from megatron_ext.monitoring.alerts import outbox
from megatron_ext.monitoring.alerts.environment import missing_secrets
from megatron_ext.monitoring.alerts.rate_limit import RateLimit
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.monitor import Monitor
from megatron_ext.monitoring.refused import alerting_of_refusal
from megatron_ext.monitoring.sinks.alerts import AlertsSink
from megatron_ext.monitoring.sinks.jsonl import JsonlSink
from tests.support.minimal_run import load, mapping
from tests.support.smtp_server import SmtpServer, certificate_context
from tests.support.waiting import wait_until
from tests.support.webhook_server import WebhookServer
from tests.unit.training.plans import plan_of_run


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(outbox, "_LONGEST_PAUSE", 0.05)


@pytest.fixture
def webhook() -> Iterator[Callable[..., WebhookServer]]:
    servers: list[WebhookServer] = []

    def start(*arguments: Any, **named: Any) -> WebhookServer:
        servers.append(WebhookServer(*arguments, **named))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, **settings: Any) -> AlertsSink:
    monkeypatch.setenv("HOOK", url)
    place = tmp_path / "runs" / "moe"
    place.mkdir(parents=True, exist_ok=True)
    is_runs, records = settings.pop("is_runs", True), place / settings.pop("records", "metrics.jsonl")
    return AlertsSink(
        AlertsConfig(webhook=WebhookConfig(url_variable="HOOK"), **settings), place, records, is_runs=is_runs
    )


def test_a_webhook_is_told_what_was_asked_for_and_no_more_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, webhook: Callable[..., WebhookServer]
) -> None:
    server = webhook()
    alerts = sink(tmp_path, monkeypatch, server.url, events=["started", "skip", "failed"])
    alerts.event(Event("started", 0, "begins on <2> nodes & more"))
    for step in range(1, 6):
        alerts.event(Event("skip", step, f"a spike at {step}"))
    alerts.event(Event("disk", 5, "nobody asked for this"))
    alerts.event(Event("failed", 6, "failed: " + 3000 * "x" + " at the end"))
    alerts.close(failed=True)
    first, skip, failed, rest = server.texts
    place = f"{tmp_path}/runs/moe on "
    assert first.startswith(":white_check_mark: *moe: started*\nstep 0: begins on &lt;2&gt; nodes &amp; more\n" + place)
    assert skip.startswith(":warning: *moe: skip*\nstep 1: a spike at 1\n" + place)
    assert failed.startswith(":x: *moe: failed*\nstep 6: failed: xxx")
    assert " at the end\n" in failed
    assert "step 5: a spike at 5\nand 3 more of this kind before it, since the last message\n" in rest


def test_a_server_that_is_away_costs_one_warning_and_no_alert_and_nobody_waits_for_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    webhook: Callable[..., WebhookServer],
) -> None:
    caplog.set_level(logging.INFO)
    server = webhook([500, 429, 404, 400])
    alerts = sink(tmp_path, monkeypatch, server.url, repeat_seconds=0.0)
    server.hangs.clear()
    for step in range(1, 21):
        alerts.event(Event("skip", step, "a spike"))  # returns while the server does not answer
    assert server.texts == []
    server.hangs.set()
    alerts.close(failed=False)
    # The first was refused for good, as no other; order is kept.
    assert [text.splitlines()[1] for text in server.texts] == [f"step {step}: a spike" for step in range(2, 21)]
    assert server.tries == 23
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == [
        "alerts do not reach the webhook, which is tried again: HTTP status 500",
        "the webhook does not take an alert of kind skip: HTTP status 400",
    ]
    assert "alerts reach the webhook again" in caplog.messages


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9/secret-token", "secret-token", "http://[secret-token", "ftp://127.0.0.1:9/secret-token"],
    ids=["closed", "no_scheme", "malformed", "ftp"],
)
def test_a_dead_webhook_is_said_once_without_its_url_and_what_was_not_sent_is_kept(
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    webhook: Callable[..., WebhookServer],
) -> None:
    monkeypatch.setattr("megatron_ext.monitoring.sinks.alerts.FLUSH_SECONDS", 0.15)
    monkeypatch.setattr(outbox, "MOST_WAITING", 3)
    alerts = sink(tmp_path, monkeypatch, url, repeat_seconds=0.0)
    for step in range(1, 10):
        alerts.event(Event("skip", step, "a spike"))
    wait_until(lambda: caplog.messages)
    alerts.close(failed=False)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("alerts do not reach the webhook, which is tried again: ")
    kept = tmp_path / "runs" / "moe" / "unsent_alerts.webhook.json"
    assert (
        caplog.messages[1] == f"9 alerts did not reach the webhook; they are kept in {kept}, and sent at the next start"
    )
    assert "secret" not in caplog.text + kept.read_text()
    server = webhook()
    monkeypatch.setattr("megatron_ext.monitoring.sinks.alerts.FLUSH_SECONDS", 20)
    sink(tmp_path, monkeypatch, server.url).close(failed=False)
    assert [text.splitlines()[1:-2] for text in server.texts] == [
        ["step 1: a spike"],
        ["step 2: a spike"],
        ["step 9: a spike", "and 6 more of this kind before it, since the last message"],
    ]
    assert "it happened 20" in server.texts[0]
    assert not kept.exists()


def test_one_that_is_on_its_way_is_among_the_most_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, webhook: Callable[..., WebhookServer]
) -> None:
    monkeypatch.setattr(outbox, "MOST_WAITING", 3)
    server = webhook()
    server.hangs.clear()
    alerts = sink(tmp_path, monkeypatch, server.url, repeat_seconds=0.0)
    for step in range(1, 10):
        alerts.event(Event("skip", step, "a spike"))
        wait_until(lambda: server.tries)
    server.hangs.set()
    alerts.close(failed=False)
    assert [text.splitlines()[1:-1] for text in server.texts] == [
        ["step 1: a spike"],
        ["step 2: a spike"],
        ["step 9: a spike", "and 6 more of this kind before it, since the last message"],
    ]


def test_a_kill_loses_no_alert_nor_does_a_start_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, webhook: Callable[..., WebhookServer]
) -> None:
    nowhere = "http://127.0.0.1:9/secret-token"
    killed = sink(tmp_path, monkeypatch, nowhere)  # never closed, as with kill -9
    for step in (1, 2, 3):
        killed.event(Event("skip", step, "a spike"))  # two of them are held back
    files = tmp_path / "runs" / "moe"
    wait_until(lambda: [path.read_text().count('"iteration": 3') for path in files.glob("*.json")] == [1])
    monkeypatch.setattr("megatron_ext.monitoring.sinks.alerts.FLUSH_SECONDS", 0.05)
    failed = sink(tmp_path, monkeypatch, nowhere, is_runs=False)
    failed.event(Event("failed", 0, "no room"))
    failed.close(failed=True)
    assert len(list(files.glob("unsent_alerts.webhook*.json"))) == 2
    damaged = files / "unsent_alerts.webhook.other.json"
    damaged.write_text("[{")
    server = webhook()
    alerts = sink(tmp_path, monkeypatch, server.url)
    alerts.event(Event("started", 3, "continued"))
    monkeypatch.setattr("megatron_ext.monitoring.sinks.alerts.FLUSH_SECONDS", 20)
    alerts.close(failed=False)
    assert [text.splitlines()[1] for text in server.texts] == [
        "step 1: a spike",
        "step 3: a spike",
        "step 0: no room",
        "step 3: continued",
    ]
    assert "and 1 more of this kind" in server.texts[1]
    assert [path.read_text() for path in files.iterdir()] == ["[{"], "what could not be read is kept"
    assert [path.name.startswith(f"{damaged.name}.unreadable-") for path in files.iterdir()] == [True]


def test_runs_whose_records_lie_in_one_folder_take_no_alerts_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, webhook: Callable[..., WebhookServer]
) -> None:
    monkeypatch.setattr("megatron_ext.monitoring.sinks.alerts.FLUSH_SECONDS", 0.05)
    for records in ("dense.jsonl", "moe.jsonl", "metrics.jsonl"):
        left = sink(tmp_path, monkeypatch, "http://127.0.0.1:9/secret-token", records=records)
        left.event(Event("skip", 1, f"of {records}"))
        left.close(failed=False)
    server = webhook()
    monkeypatch.setattr("megatron_ext.monitoring.sinks.alerts.FLUSH_SECONDS", 20)
    sink(tmp_path, monkeypatch, server.url, records="moe.jsonl").close(failed=False)
    assert [text.splitlines()[1] for text in server.texts] == ["step 1: of moe.jsonl"]
    kept = sorted(path.name for path in (tmp_path / "runs" / "moe").iterdir())
    assert kept == ["unsent_alerts.dense.webhook.json", "unsent_alerts.webhook.json"]


def test_a_file_of_alerts_that_cannot_be_read_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = tmp_path / "runs" / "moe"
    files.mkdir(parents=True)
    own = files / "unsent_alerts.webhook.json"
    monkeypatch.setattr("megatron_ext.monitoring.sinks.alerts.FLUSH_SECONDS", 0.05)
    for content in ("[{", "[7]"):
        own.write_text(content)
        alerts = sink(tmp_path, monkeypatch, "http://127.0.0.1:9/secret-token")
        alerts.event(Event("started", 3, "continued"))
        alerts.close(failed=False)
        assert json.loads(own.read_text())[0]["text"] == "continued"
    kept = sorted(files.glob(f"{own.name}.unreadable-*"))
    assert sorted(path.read_text() for path in kept) == ["[7]", "[{"]
    assert all(str(path) in caplog.text for path in kept)


def test_an_error_is_sent_before_the_process_may_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, webhook: Callable[..., WebhookServer]
) -> None:
    server = webhook([503])
    alerts = sink(tmp_path, monkeypatch, server.url)
    alerts.event(Event("lost_rank", 7, "rank 3 on node 2 has ended"))
    alerts.flush()
    assert len(server.texts) == 1


@pytest.mark.parametrize(
    ("override", "sent"),
    [("model.nope=3", 1), ("checkpoint.nope=3", 1), ("alerts.nope=3", 0)],
    ids=lambda value: str(value),
)
def test_a_restart_whose_configuration_has_a_fault_is_told_where_that_says_whom(
    override: str, sent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, webhook: Callable[..., WebhookServer]
) -> None:
    server, path, place = webhook(), tmp_path / "run.yaml", tmp_path / "moe"
    monkeypatch.setenv("HOOK", server.url)
    raw = mapping(checkpoint={"directory": str(place)}, alerts={"webhook": {"url_variable": "HOOK"}})
    path.write_text(dump_yaml(raw))

    def start() -> None:
        with pytest.raises(ConfigError), alerting_of_refusal(lambda: read_run_text(path, [override]).values):
            load_run(path, [override])

    start()
    assert not server.texts  # whoever starts a new run watches it
    place.mkdir()
    (place / "metrics.jsonl").touch()
    start()
    assert len(server.texts) == sent
    assert all(override.replace("=", " = ") in text for text in server.texts)


def test_an_alert_leaves_although_the_file_system_of_the_records_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, webhook: Callable[..., WebhookServer]
) -> None:
    server, hangs = webhook(), threading.Event()
    monkeypatch.setenv("HOOK", server.url)
    run = load(mapping(checkpoint={"directory": str(tmp_path)}, alerts={"webhook": {"url_variable": "HOOK"}}))
    monitor = Monitor(run, run.resolve(1), plan_of_run(run), 0, "abcd1234", Clock())
    monkeypatch.setattr(JsonlSink, "event", lambda self, event: hangs.wait(60))
    told = threading.Thread(target=monitor.event, args=[Event("stall", 3, "nothing moves")], daemon=True)
    told.start()
    wait_until(lambda: any("nothing moves" in text for text in server.texts))
    hangs.set()
    told.join()
    monitor.close()


def test_a_redirect_to_a_page_is_no_delivery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, webhook: Callable[..., WebhookServer], caplog: Any
) -> None:
    server = webhook([302])
    alerts = sink(tmp_path, monkeypatch, server.url)
    alerts.event(Event("lost_rank", 7, "rank 3 on node 2 has ended"))
    alerts.flush()
    assert len(server.texts) == 1
    assert "tried again: HTTP status 302" in caplog.text


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 5)), max_size=40), st.floats(0.1, 8))
def test_every_event_is_told_of_once_and_kinds_keep_their_distance(
    arrivals: list[tuple[str, float]], gap: float
) -> None:
    limit, now = RateLimit(gap), 0.0
    passed: list[tuple[str, float, int]] = []
    for number, (kind, pause) in enumerate(arrivals):
        while (due := limit.next_due()) is not None and due <= now + pause:
            now, pause = due, now + pause - due
            passed += [(event.kind, now, 1 + before) for event, before in limit.due(now)]
        now += pause
        if limit.admit(Event(kind, number, ""), now):
            passed.append((kind, now, 1))
    told = sum(count for _, _, count in passed) + sum(1 + before for _, before in limit.rest())
    assert told == len(arrivals)
    for kind in "abc":
        times = [at for name, at, _ in passed if name == kind]
        assert all(later - earlier >= gap * (1 - 1e-9) for earlier, later in zip(times, times[1:], strict=False))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a server called localhost."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    made = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-out", str(made[0]), "-keyout", str(made[1])]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return made


def mail(port: int, **settings: Any) -> EmailConfig:
    who = {"sender": "run@example.org", "recipients": ["a@example.org", "b@example.org"], "host": "localhost"}
    return EmailConfig(port=port, **{**who, **settings})


def test_mail_goes_over_tls_with_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path]
) -> None:
    server = SmtpServer(tls=certificate_context(*certificate), password="open sesame")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("MAIL_PASSWORD", "open sesame")
    settings = mail(server.port, username="me", password_variable="MAIL_PASSWORD")
    alerts = AlertsSink(AlertsConfig(email=settings), tmp_path / "moe", tmp_path / "metrics.jsonl")
    alerts.event(Event("finished", 100, "finished all 100 steps, in 3 h"))
    alerts.close(failed=False)
    server.close()
    (text,) = server.mails
    assert "Subject: moe: finished\r\n" in text
    assert "To: a@example.org, b@example.org\r\n" in text
    assert "step 100: finished all 100 steps, in 3 h\r\n" in text


@pytest.mark.parametrize(
    ("trusts", "password", "refuses", "said"),
    [
        (False, "open sesame", 0, "its certificate is not accepted: self-signed certificate"),
        (True, "guessed", 0, "SMTPAuthenticationError, code 535"),
        (True, "open sesame", 451, "it refused the recipients, with 451, 451"),
    ],
    ids=["certificate", "password", "later"],
)
def test_mail_that_does_not_go_says_why_without_the_password(
    trusts: bool,
    password: str,
    refuses: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    certificate: tuple[Path, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("megatron_ext.monitoring.sinks.alerts.FLUSH_SECONDS", 0.3)
    server = SmtpServer(tls=certificate_context(*certificate), password="open sesame", refuses=refuses)
    if trusts:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("MAIL_PASSWORD", password)
    settings = mail(server.port, username="me", password_variable="MAIL_PASSWORD")
    alerts = AlertsSink(AlertsConfig(email=settings), tmp_path / "moe", tmp_path / "metrics.jsonl")
    alerts.event(Event("finished", 1, "done"))
    wait_until(lambda: "tried again" in caplog.text)
    alerts.close(failed=False)
    server.close()
    assert server.mails == []
    assert f"alerts do not reach the mail server, which is tried again: {said}" in caplog.text
    assert password not in caplog.text


def test_mail_without_encryption_and_a_recipient_that_is_refused_for_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = SmtpServer(refuses=550)
    alerts = AlertsSink(
        AlertsConfig(email=mail(server.port, security="none")), tmp_path / "moe", tmp_path / "metrics.jsonl"
    )
    alerts.event(Event("skip", 1, "a spike"))
    wait_until(lambda: "does not take" in caplog.text)
    server.refuses = 0
    alerts.event(Event("finished", 2, "done"))
    alerts.close(failed=False)
    server.close()
    assert [line for line in server.mails[0].splitlines() if line.startswith("step")] == ["step 2: done"]
    assert caplog.messages == [
        "the mail server does not take an alert of kind skip: it refused the recipients, with 550, 550"
    ]


def test_what_alerts_need_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_HOOK", raising=False)
    assert missing_secrets(AlertsConfig(webhook=WebhookConfig(url_variable="NO_SUCH_HOOK"))) == [
        "alerts.webhook.url_variable = 'NO_SUCH_HOOK': this environment variable is not set; set it in the job, or "
        "remove the section"
    ]
    plain = {"host": "h", "sender": "s", "recipients": ["r"], "security": "none"}
    wrong = [
        ({"wandb": True}, r"alerts.wandb = True, logging.wandb.mode = 'off': there is no W&B run"),
        ({"events": ["skips"]}, r"alerts.events = \['skips'\]: must be one of 'started', 'finished'"),
        ({"email": plain | {"username": "me"}}, "alerts.email.password_variable = None: set both, or neither"),
        ({"email": plain | {"username": "me", "password_variable": "P"}}, "the password would travel in clear"),
    ]
    for alerts, said in wrong:
        with pytest.raises(ConfigError, match=said):
            load(mapping(alerts=alerts))
