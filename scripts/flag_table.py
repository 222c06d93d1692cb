"""Write the tables of flags in docs/configuration.md from server/settings.py.

Run: python scripts/flag_table.py
"""

import re
from pathlib import Path
from typing import Literal, get_args, get_origin

from server.settings import GROUPS, Settings, default_text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
_TABLE = re.compile(r"(?<=<!-- flags -->\n).*?(?=<!-- /flags -->)", re.DOTALL)


def rows() -> list[str]:
    """Return the lines of one table for each group: one line for each flag, in the order of the settings."""
    lines: list[str] = []
    for name, field in Settings.model_fields.items():
        if title := GROUPS.get(name):
            lines += ["", f"### {title.capitalize()}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
        default = default_text(field.default)
        lines.append(f"| {_flag(name)} | {f'`{default}`' if default else ''} | {field.description} |")
    return lines


def _flag(name: str) -> str:
    """Return the flag with its choices; for a boolean that can be on by default, also the flag that turns it off."""
    field, words = Settings.model_fields[name], name.replace("_", "-")
    if get_origin(field.annotation) is Literal:
        return f"`--{words}` {', '.join(f'`{choice}`' for choice in get_args(field.annotation))}"
    is_switch = field.annotation is bool or bool in get_args(field.annotation)
    return f"`--{words}`, `--no-{words}`" if is_switch and field.default is not False else f"`--{words}`"


def with_table(page: str) -> str:
    """Return `page` with its tables of flags replaced by the current ones."""
    return _TABLE.sub(lambda _: "\n".join(rows()) + "\n\n", page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
