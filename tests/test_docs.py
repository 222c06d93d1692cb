"""README and docs: flags, exit codes, alerts, metrics, tests and links that they name exist, and pages stay short."""

import re
import sys
from pathlib import Path

import pytest
from serving import ROOT

from server import __version__
from server.ensemble import checkpoint
from server.errors import exit_codes
from server.settings import Settings

sys.path.insert(0, str(ROOT / "scripts"))
import flag_table  # scripts/ is no package

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CLIENT = "".join(path.read_text("utf-8") for path in (ROOT / "clients/python/text_to_image_client").rglob("*.py"))
PROSE = [README, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *PAGES]
PROSE += [
    ROOT / folder / "README.md" for folder in ("clients/python", "deploy/instill", "examples", "training", "weights")
]
PROSE += [ROOT / "CONTRIBUTING.md", ROOT / "findings/README.md"]


def read(path: Path) -> str:
    return path.read_text("utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_table_of_flags_is_that_of_the_settings():
    page = read(flag_table.PAGE)
    assert flag_table.with_table(page) == page, "run: python scripts/flag_table.py"


def test_the_fingerprint_in_the_example_is_that_of_the_embedded_weights():
    shown = set(re.findall(r'"fingerprint": "([0-9a-f]{64})"', read(DOCS / "grpc.md")))
    assert shown == {checkpoint.inspect(*Settings().experts).fingerprint()}


def test_every_exit_code_is_in_the_table():
    section = read(DOCS / "configuration.md").split("## Exit codes")[1].split("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)} == exit_codes().keys()


def test_one_version_everywhere():
    client = re.findall(r'^version = "(.*)"', read(ROOT / "clients/python/pyproject.toml"), re.MULTILINE)
    changelog = re.findall(r"^## \[(\d.*?)\]", read(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert [*client, changelog[0]] == [__version__, __version__]
    files = [README, *PAGES, ROOT / "Dockerfile", ROOT / "clients/python/README.md"]
    files += [path for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    images = {tag for path in files for tag in re.findall(r"text-to-image-service(?:-ray)?:v?(\d[\d.]*\d)", read(path))}
    tags = {tag for path in files for tag in re.findall(r"newTag: (\d[\d.]*\d)", read(path))}
    assert images | tags == {__version__}


def test_every_alert_has_a_row_in_troubleshooting():
    alerts = re.findall(r"- alert: (\w+)", read(ROOT / "deploy/prometheus/alerts.yaml"))
    shown = re.findall(r"TextToImage(?!Service)[A-Z]\w+", read(DOCS / "troubleshooting.md"))
    assert alerts
    assert set(shown) == set(alerts)


def test_every_metric_is_explained_and_no_other():
    defined = "".join(read(path) for path in (ROOT / "server/observability").glob("*.py"))
    metrics = set(re.findall(r'"(t2i_\w+)"', defined))
    assert metrics
    assert set(re.findall(r"`(t2i_\w+)", read(DOCS / "monitoring.md"))) == metrics


# Flags of other programs that these pages show.
OTHERS = set("gpus publish read-only tmpfs stop-timeout health-cmd fingerprint build-arg device session".split())


@pytest.mark.parametrize("page", [README, *(page for page in PAGES if "benchmarks" not in page.parts)], ids=name_of)
def test_flags_in_prose_exist(page: Path):
    flags = set(re.findall(r"`--(?:no-)?([a-z][a-z-]*)", read(page)))
    servers = {name.replace("_", "-") for name in Settings.model_fields}
    clients = set(re.findall(r'"--([a-z-]+)"', CLIENT))
    assert flags - servers - clients - OTHERS == set()


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_variables_in_prose_exist(page: Path):
    if page.name == "CHANGELOG.md":
        pytest.skip("names the old variables too")
    clients = set(re.findall(r"T2I_[A-Z_]+", CLIENT))
    servers = {f"T2I_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"T2I_[A-Z]+(?:_[A-Z]+)*", read(page))) - servers - clients == set()


def test_every_test_that_the_threat_table_names_exists():
    shown = re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", read(DOCS / "security.md"))
    defined = "".join(read(path) for path in (ROOT / "tests").rglob("test_*.py"))
    assert shown
    assert [name for name in shown if f"def {name}(" not in defined] == []


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_files_that_prose_names_exist(page: Path):
    folders = "tests|server|bench|deploy|proto|scripts|examples"
    paths = re.findall(rf"(?<![\w/.])(?:{folders})/[\w/]+(?:\.\w+|/)", read(page))
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_commands_in_prose_exist(page: Path):
    if page.name == "CHANGELOG.md":
        pytest.skip("names the old commands too")
    targets = set(re.findall(r"^([a-z][a-z-]*):", read(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"\bmake (?=[a-z])((?:[a-z]+-)*[a-z]+)\b(?=[ `\n])", code(page))) - targets == set()
    for module in re.findall(r"python -m ((?:server|bench|training)[\w.]*)", read(page)):
        path = ROOT / module.strip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_the_tests_that_commands_select_exist(page: Path):
    for paths, quoted, word in re.findall(r"pytest ((?:tests[\w/.]* ?)+)-k (?:\"([^\"]+)\"|(\w+))", code(page)):
        folders = [ROOT / path for path in paths.split()]
        files = [file for path in folders for file in (path.rglob("test_*.py") if path.is_dir() else [path])]
        names = " ".join(re.findall(r"(?:def |class |id=\"|: \")(\w[\w -]*)", "".join(map(read, files)))).lower()
        for each in re.findall(r"\w+", quoted or word):
            assert each in ("and", "or", "not") or each.lower() in names, f"{paths}-k {each}"


def code(page: Path) -> str:
    """The code of a page: blocks and spans."""
    text = read(page)
    return "\n".join(re.findall(r"^ *```.*?^ *```", text, re.MULTILINE | re.DOTALL) + re.findall(r"`[^`\n]+`", text))


def test_the_readme_and_every_page_are_short():
    assert len(read(README).splitlines()) <= 220
    assert [name_of(page) for page in PAGES if len(read(page).splitlines()) > 300] == []


def test_few_words_of_the_former_dialect_are_left():
    words = re.compile("told|made over|anew|beside|meanwhile|twin|lessen", re.IGNORECASE)
    files = [path for folder in ("server", "clients", "docs") for path in (ROOT / folder).rglob("*")]
    files = [path for path in files if path.suffix in (".py", ".md", ".cpp") and "_pb2" not in path.name]
    counts = {name_of(path): len(words.findall(read(path))) for path in [README, ROOT / "SECURITY.md", *files]}
    assert sum(counts.values()) <= 60, {name: count for name, count in counts.items() if count}


def anchors(page: Path) -> set[str]:
    """The ids that GitHub and MyST give to the headings of a page."""
    prose = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_relative_links_lead_somewhere(page: Path):
    prose = re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_index_of_its_folder():
    for index in (DOCS / "index.md", DOCS / "benchmarks/index.md"):
        links = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+\.md)", read(index))}
        assert {*index.parent.glob("*.md")} - {index} <= links
