"""A hook of the site: the repository's own pages are pages of it, so that nothing is written twice.

`docs/` is the site's root and so is the repository's: README.md is the index, and what lies in other folders keeps its
path. Links between the two are written for the repository, and are rewritten here.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "projects/README.md", "benchmarks/results/**/*.*", "examples/*.*")
DATA = {".md", ".png", ".json", ".ipynb", ".py"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's pages, and what they show."""
    sources = {"index.md": ROOT / "README.md"}
    found = (path for pattern in PAGES for path in sorted(ROOT.glob(pattern)) if path.suffix in DATA)
    sources |= {path.relative_to(ROOT).as_posix(): path for path in found}
    for uri, path in sources.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """From the repository's paths to the site's: `docs/` is where `../` leads to from there."""
    of_docs = page.file.generated_by is None
    if of_docs:
        return re.sub(r"\]\(\.\./", "](", markdown)
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
