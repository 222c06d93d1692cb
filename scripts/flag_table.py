"""Write the tables of flags in docs/configuration.md from server/settings.py.

Run: python scripts/flag_table.py
"""

import re
from pathlib import Path

from server.settings import GROUPS, Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
_TABLE = re.compile(r"(?<=<!-- flags -->\n).*?(?=<!-- /flags -->)", re.DOTALL)


def rows() -> list[str]:
    """Return the lines of one table for each group: one line for each flag, in the order of the settings."""
    lines: list[str] = []
    for name, field in Settings.model_fields.items():
        if title := GROUPS.get(name):
            lines += ["", f"### {title.capitalize()}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
        default = {True: "on", False: "off"}[field.default] if isinstance(field.default, bool) else field.default
        shown = "" if default is None else f"`{default}`"
        lines.append(f"| `--{name.replace('_', '-')}` | {shown} | {field.description} |")
    return lines


def with_table(page: str) -> str:
    """Return `page` with its tables of flags replaced by the current ones."""
    return _TABLE.sub(lambda _: "\n".join(rows()) + "\n\n", page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
