"""A short form of the soak tests, which `make soak` runs in full: docs/soak.md."""

import pytest

from soak import flags, messages, signals, start

SEED = 25


def test_invalid_flags_are_rejected_and_unusual_ones_start_a_server():
    report = flags.campaign(count=20, seed=SEED, seconds=60, starts=4, share=0.2)
    assert not report.violations, str(report)
    assert report.counts["invalid values"] > 100


def test_thousands_of_messages_cause_no_server_error():
    report = messages.campaign(count=2000, seed=SEED, seconds=60, workers=2)
    assert not report.violations, str(report)
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"} <= {code for _, code in report.ends}


def test_a_server_on_a_lacking_machine_serves_or_reports_missing_for():
    report = start.campaign(count=6, seed=SEED, seconds=60, real=False)
    assert not report.violations, str(report)
    assert report.counts


def test_signals_at_random_moments_cause_no_violation():
    report = signals.campaign(count=10, seed=SEED, seconds=60)
    assert not report.violations, str(report)
    assert report.signals.total() >= 5


def test_the_real_model_needs_no_writable_folder():
    (case,) = (case for case in start.CASES if case.name == "no writable folder")
    if (reason := start.missing_for(case)) is not None:
        pytest.skip(reason)
    assert not start.repeat(case.name)
