"""Test the expected times of calls."""

import pytest

from server.domain import Stage
from server.engine.call_times import CallKind, CallTimes

BASE = CallKind(Stage.BASE, 1024, 1024, 2)


def measured(*seconds: float, kind: CallKind = BASE, jobs: int = 1) -> CallTimes:
    times = CallTimes()
    for each in seconds:
        times.record(kind, each, jobs)
    return times


def test_unknown_stage_has_no_expectation():
    assert CallTimes().expect(BASE) == 0
    assert measured(3.0).expect(BASE._replace(stage=Stage.DECODE)) == 0


def test_expectation_is_the_measurement():
    assert measured(0.5).expect(BASE) == 0.5


def test_slow_first_call_is_ignored_after_the_second():
    assert measured(60.0, 0.5).expect(BASE) == 0.5


def test_outliers_are_ignored():
    assert measured(0.5, 0.5, 90.0, 0.5, 0.5, 70.0, 0.5).expect(BASE) == 0.5


def test_lasting_change_is_adopted():
    assert measured(*[0.5] * 20, *[0.8] * 9).expect(BASE) == 0.8


@pytest.mark.parametrize(
    ("kind", "jobs", "seconds"),
    [
        (BASE._replace(width=512), 1, 0.25),
        (BASE._replace(rows=1), 1, 0.25),
        (BASE, 4, 2.0),
        (BASE._replace(stage=Stage.REFINER), 1, 0.5),
    ],
)
def test_unmeasured_kind_is_scaled_from_the_nearest_size(kind: CallKind, jobs: int, seconds: float):
    assert measured(0.5).expect(kind, jobs) == pytest.approx(seconds)


def test_scaling_starts_from_the_nearest_size():
    times = measured(0.5)
    times.record(BASE._replace(width=256), 0.2)
    assert times.expect(BASE._replace(width=128)) == pytest.approx(0.1)


def test_measured_batch_overrides_scaling():
    times = measured(0.5)
    times.record(BASE, 1.5, jobs=4)
    assert times.expect(BASE, 4) == 1.5
    assert times.expect(BASE) == 0.5


def test_deviation_is_the_mean_relative_error_of_expectations():
    assert measured(1.0).deviation == 0.0
    assert measured(1.0, 1.0, 1.3, 0.9).deviation == pytest.approx(0.4 / 3)
    assert measured(1.0, 60.0).deviation == 1.0


def test_version_changes_with_notable_changes_only():
    times = measured(0.5)
    version = times.version
    times.record(BASE, 0.51)
    assert times.version == version
    for _ in range(9):
        times.record(BASE, 0.6)
    assert times.version != version
