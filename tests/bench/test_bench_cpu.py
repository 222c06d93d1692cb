"""The benchmark on a CPU, as far as it can be told wrong in a minute."""

import re
import subprocess
import sys

import pytest
from serving import PATIENCE, ROOT


@pytest.mark.slow
def test_each_way_is_timed_beside_stock_diffusers_and_draws_its_picture():
    command = [sys.executable, "-m", "bench.cpu", "--ways", "stock", "off", "--rounds", "2", "--steps", "5"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 0, ended.stderr
    stock, off = re.findall(r"\| (?:stock|off) \| .* ([\d.]+|inf) dB \| (\d+) \|", ended.stdout)
    assert stock == off == ("inf", "0")
