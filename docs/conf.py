"""Configure Sphinx: the Markdown of this repository as a site.

Sphinx with MyST and Furo instead of mkdocs-material: it checks anchors as well as links, turns links to files of the
repository into downloads, and no page loads anything from elsewhere. Run: make docs
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.search(r'__version__ = "(.*)"', (ROOT / "server" / "__init__.py").read_text("utf-8"))
assert VERSION is not None

project = "text-to-image-service"
release = version = VERSION[1]
root_doc = "docs/index"
OTHERS = "README CONTRIBUTING CODE_OF_CONDUCT SECURITY CHANGELOG".split()
OTHERS += "clients/python/README deploy/instill/README examples/README".split()
OTHERS += "training/README weights/README findings/README".split()

include_patterns = ["docs/**.md", *(f"{page}.md" for page in OTHERS)]
exclude_patterns = [".*", "out", "build", "training/runs", "training/art"]
extensions = ["myst_parser"]
myst_heading_anchors = 3  # as GitHub makes them

html_theme = "furo"
html_title = f"text-to-image-service {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
highlight_language = "none"  # of blocks that name no language: output, not Python
smartquotes = False  # they make a dash of the -- of a flag


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Make the sidebar from the tables of an index: a caption for each heading, an entry for each link to a page."""
    if name not in ("docs/index", "docs/benchmarks/index"):
        return
    trees = []
    for section in re.split(r"^#+ ", source[0], flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        if pages := re.findall(r"^\|.*?\]\(([^)#]+)\.md\)", text, re.MULTILINE):
            caption = f":caption: {title}\n" if name == root_doc else ""
            trees.append("```{toctree}\n:hidden:\n" + caption + "\n" + "\n".join(pages) + "\n```\n")
    if name == root_doc:
        pages = [f"/{page}" for page in OTHERS if (ROOT / f"{page}.md").exists()]
        trees.append("```{toctree}\n:hidden:\n:caption: In the repository\n\n" + "\n".join(pages) + "\n```\n")
    source[0] += "\n" + "\n".join(trees)


def setup(app: Sphinx) -> None:
    """Connect the hook above; Sphinx calls this."""
    app.connect("source-read", add_contents)
