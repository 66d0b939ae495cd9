"""Pages of the documentation site that are not in docs/: an MkDocs hook, see mkdocs.yml.

- documents from elsewhere in the repository, such as the README as the first page,
- the API reference, a page for each package, read from the sources without importing them,
- a listing of each other file or folder that a page links to.

Links between documents are written for the repository; `rewrite` makes them links of the site.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Page of the site -> document of the repository.
DOCUMENTS = {
    "index.md": "README.md",
    "embedded.md": "realgen_jax/embedded/README.md",
    "benchmarks.md": "benchmarks/NOTES.md",
    "examples.md": "examples/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
PACKAGES = ("realgen_jax", "reward_bridge")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json", ".jsonl": "json"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the API reference to the navigation."""
    pages = [{title: name} for title, name, _ in reference()]
    config.nav.append({"API reference": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for page, document in DOCUMENTS.items():
        files.append(File.generated(config, page, content=(ROOT / document).read_text()))
    for title, page, modules in reference():
        blocks = [f"::: {module}\n" for module in modules]
        files.append(File.generated(config, page, content="\n".join([f"# {title}\n", *blocks])))

    # Listings of linked files. The listing of a folder links to those of its files.
    waiting = []
    for file in list(files.documentation_pages()):
        waiting += targets(file.src_uri, file.content_string)
    while waiting:
        path = waiting.pop()
        page = page_of(path)
        if page in files.src_uris or not (ROOT / path).exists():
            continue
        text = listing(path)
        files.append(File.generated(config, page, content=text))
        waiting += targets(page, text)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links of a document links of the site."""
    return rewrite(page.file.src_uri, markdown)


def reference() -> list[tuple[str, str, list[str]]]:
    """Return (title, page, modules) of the API reference: a page for each package."""
    pages = []
    for package in PACKAGES:
        folders = [ROOT / package]
        folders += [file.parent for file in sorted((ROOT / package).glob("*/__init__.py"))]
        for folder in folders:
            name = ".".join(folder.relative_to(ROOT).parts)
            files = sorted(folder.glob("*.py") if folder.name == package else folder.rglob("*.py"))
            modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
            names = sorted({module.removesuffix(".__init__") for module in modules})
            names = [module for module in names if not module.endswith(".__main__")]
            pages.append((name, f"api/{name}.md", names))
    return pages


def repository_path(page: str) -> str:
    """Return the path in the repository of the document that a page shows."""
    if page in DOCUMENTS:
        return DOCUMENTS[page]
    if page.startswith("source/"):
        return page.removeprefix("source/").removesuffix(".md")
    return f"docs/{page}"


def page_of(path: str) -> str:
    """Return the page, or the other file of the site, that shows a path of the repository."""
    for page, document in DOCUMENTS.items():
        if path == document:
            return page
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def targets(page: str, markdown: str) -> Iterator[str]:
    """Yield the paths in the repository to which a page's document links."""
    folder = os.path.dirname(repository_path(page))
    for link, _ in LINK.findall(markdown):
        yield os.path.normpath(os.path.join(folder, link))


def rewrite(page: str, markdown: str) -> str:
    """Return a document with its links between files of the repository as links of the site."""
    folder = os.path.dirname(repository_path(page))

    def site_link(match: re.Match) -> str:
        path = os.path.normpath(os.path.join(folder, match[1]))
        if path.startswith("..") or not (ROOT / path).exists():
            return match[0]  # MkDocs says that there is no such file
        return os.path.relpath(page_of(path), os.path.dirname(page)) + (match[2] or "")

    return LINK.sub(site_link, markdown)


def listing(path: str) -> str:
    """Return a page that shows a file of the repository, or what is in a folder."""
    source = ROOT / path
    if source.is_dir():
        names = sorted(file.name for file in source.iterdir() if file.suffix in LANGUAGES)
        return "\n".join(
            [f"{UNSEARCHED}# {path}/\n", *(f"* [{name}]({path}/{name})" for name in names)]
        )
    language = LANGUAGES.get(source.suffix, "text")
    return f"{UNSEARCHED}# {path}\n\n````{language}\n{source.read_text()}\n````\n"
