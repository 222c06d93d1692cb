#!/usr/bin/env bash
# Guess: a counter that is given a wrong exemplar raises before it counts, or counts without it.
# Seen: it counts, and then raises. A caller that catches the error and counts again counts twice; one that does not
#   has a call that fails for its metrics. The message has its figure left out: "have %d UTF-8 characters".
# With: prometheus_client 0.26.0.
# Why it matters: exemplars hold names of traces and of callers, and the limit of 128 characters is for all of them
#   together, so that it is a long name of a caller that makes the call fail.
# Output seen: counted before the error: 1.0; Exemplar labels have %d UTF-8 characters, exceeding the limit of 128
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages prometheus_client==0.26.0
PYTHONPATH=packages timeout 60 "${PYTHON:-python3.11}" - <<'PYTHON'
import sys

from prometheus_client import REGISTRY, Counter

jobs = Counter("jobs", "jobs begun")
try:
    jobs.inc(exemplar={"caller": "a" * 130})
    sys.exit("changed: a long exemplar is accepted")
except ValueError as error:
    counted = REGISTRY.get_sample_value("jobs_total")
    print(f"counted before the error: {counted}; {error}")
if counted != 1:
    sys.exit("changed: a counter that raises does not count")
PYTHON
