"""A short form of the campaign in soak/, which `make soak` runs whole: docs/soak.md."""

import pytest

from soak import flags, messages, signals, start

SEED = 25


def test_wrong_flags_and_variables_are_refused_in_words_and_odd_ones_work():
    report = flags.campaign(count=20, seed=SEED, seconds=60, starts=4, share=0.2)
    assert not report.violations, str(report)
    assert report.counts["values that must be refused"] > 100


def test_no_message_of_thousands_makes_a_fault_of_the_server():
    report = messages.campaign(count=2000, seed=SEED, seconds=60, workers=2)
    assert not report.violations, str(report)
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"} <= {code for _, code in report.ends}


def test_a_server_that_lacks_something_serves_or_says_why_not():
    report = start.campaign(count=6, seed=SEED, seconds=60, real=False)
    assert not report.violations, str(report)
    assert report.counts


def test_signals_at_any_moment_break_no_promise():
    report = signals.campaign(count=10, seed=SEED, seconds=60)
    assert not report.violations, str(report)
    assert report.signals.total() >= 5


def test_the_real_model_needs_no_folder_to_write_to():
    (case,) = (case for case in start.CASES if case.name == "no folder to write to")
    if (reason := start.why_not(case)) is not None:
        pytest.skip(reason)
    assert not start.repeat(case.name)
