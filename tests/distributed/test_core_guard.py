"""Every entry of core_guard describes the installed megatron-core: its fault can be shown, or is fixed as it says."""

import pytest

from megatron_ext.errors import EnvironmentFault
from megatron_ext.runtime import core_guard
from megatron_ext.testing.pool import GlooPool
from tests.distributed import core_faults, core_faults_of_tools

SHOWN = core_faults.SHOWN | core_faults_of_tools.SHOWN
SHOWABLE = [fault for fault in core_guard.FAULTS if fault.needs is None]


def test_every_fault_is_shown_or_says_what_that_takes() -> None:
    assert set(SHOWN) == {fault.name for fault in SHOWABLE}


@pytest.mark.parametrize("fault", SHOWABLE, ids=lambda fault: fault.name)
def test_fault_is_there_in_the_versions_listed(fault: core_guard.Fault, pool: GlooPool) -> None:
    version = core_guard.installed_version()
    shown = SHOWN[fault.name](pool)
    expected = fault.present_in(version)
    assert shown == expected, (
        f"megatron-core {version} {'has' if shown else 'no longer has'} this fault: {fault.what}. "
        "Change fixed_in in core_guard.FAULTS, and remove our answer where no supported version needs it"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_p2p_comm", True),
        ("calculate_per_token_loss", True),
        ("fp8", "hybrid"),
    ],
)
def test_overrides_that_bring_a_fault_back_are_refused(field: str, value: object) -> None:
    present = any(field in f.overrides and f.present_in(core_guard.installed_version()) for f in core_guard.FAULTS)
    complaints = core_guard.complaints_about({field: value})
    assert bool(complaints) == present
    assert all(text.startswith(f"model.transformer_overrides.{field} = {value!r}: ") for text in complaints)


def test_harmless_overrides_pass() -> None:
    assert core_guard.complaints_about({"deallocate_pipeline_outputs": True}) == []


def test_versions_outside_the_tested_range_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.20.0")
    with pytest.raises(EnvironmentFault, match="0.20.0 is installed"):
        core_guard.installed_version()
