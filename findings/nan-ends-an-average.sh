#!/usr/bin/env bash
# Guess: Histogram.observe(NaN) is refused, or counted in the bucket of +Inf alone.
# Seen: it is counted nowhere, neither in a bucket nor in _count, but it is added to _sum, which is NaN from then on.
#   Every average over that series, which is _sum by _count, is NaN until the process starts again.
# With: prometheus_client 0.26.0.
# Why it matters: one duration that is no number, from a division of nothing by nothing in a warm-up say, blinds the
#   panel and the alert on it, and the counts give no hint of when it was.
# Output seen: after 1, NaN, 1: count 2, +Inf bucket 2, sum nan
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages prometheus_client==0.26.0
PYTHONPATH=packages timeout 60 "${PYTHON:-python3.11}" - <<'PYTHON'
import math
import sys

from prometheus_client import REGISTRY, Histogram

duration = Histogram("call_seconds", "how long calls take")
for seconds in (1, math.nan, 1):
    duration.observe(seconds)
count = REGISTRY.get_sample_value("call_seconds_count")
infinite = REGISTRY.get_sample_value("call_seconds_bucket", {"le": "+Inf"})
total = REGISTRY.get_sample_value("call_seconds_sum")
print(f"after 1, NaN, 1: count {count:.0f}, +Inf bucket {infinite:.0f}, sum {total}")
if (count, infinite) != (2, 2) or not math.isnan(total):
    sys.exit("changed: a histogram does something else with NaN")
PYTHON
