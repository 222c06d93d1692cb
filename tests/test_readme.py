"""What README and operating guide tell of flags, exit codes and alerts is there, and so are SECURITY.md's tests."""

import re

from pydantic_core import PydanticUndefined
from serving import ROOT

from server import __main__ as command
from server.ensemble import checkpoint
from server.settings import Settings

README = (ROOT / "README.md").read_text("utf-8")


def flag_table() -> list[str]:
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else "on" if field.default is True else field.default
        assert field.default is not PydanticUndefined
        rows.append(
            f"| `--{name.replace('_', '-')}` | {f'`{default}`' if default != '' else ''} | {field.description} |"
        )
    return rows


def test_the_table_of_flags_is_that_of_the_settings():
    assert "\n".join(flag_table()) in README, "\n".join(["paste this into the README:", *flag_table()])


def test_the_fingerprint_in_the_example_is_that_of_the_embedded_weights():
    told = set(re.findall(r'"fingerprint": "([0-9a-f]{64})"', README))
    assert told == {checkpoint.inspect(*Settings().experts).fingerprint()}


def test_every_exit_code_is_told():
    codes = {0, 1, 2, *command._EXIT_CODES.values()}
    codes |= {kind.exit_code for kind in checkpoint.CheckpointError.__subclasses__()}
    section = README.split("### Exit codes")[1].split("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)} == codes


def test_the_operating_guide_has_every_alert_and_no_flag_that_is_not_there():
    guide = (ROOT / "docs" / "operations.md").read_text("utf-8")
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text("utf-8"))
    assert alerts
    assert [alert for alert in alerts if f"`{alert}`" not in guide] == []
    flags = set(re.findall(r"`--(?:no-)?([a-z-]+)", guide))
    assert flags <= {name.replace("_", "-") for name in Settings.model_fields}


def test_every_test_that_the_threat_table_names_is_there():
    told = re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", (ROOT / "SECURITY.md").read_text("utf-8"))
    there = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert told
    assert [name for name in told if f"def {name}(" not in there] == []
