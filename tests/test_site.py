"""The documentation site builds without a warning, and its pages load nothing from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.goldens import ROOT

pytest.importorskip("mkdocs", reason='mkdocs is not installed (extra "docs")')


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """As `make docs` builds it: strictly."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("WARNING|ERROR", done.stdout + done.stderr)
    return folder


@pytest.fixture(scope="module")
def pages():
    """The module docs/site_pages.py."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_there(site, pages):
    names = [file.stem for file in (ROOT / "docs").glob("*.md")]
    names += [Path(page).stem for page in pages.DOCUMENTS]
    names += [page.removesuffix(".md") for _, page, _ in pages.reference()]
    assert len(names) > 30
    for name in names:
        assert (site / f"{name}.html").exists(), name
    assert "before_after.png" in (site / "index.html").read_text()


def test_the_reference_has_every_module_and_its_docstring(site, pages):
    modules = set()
    for _, page, names in pages.reference():
        text = (site / page).with_suffix(".html").read_text()
        modules |= {name for name in names if f'id="{name}"' in text}
    expected = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in pages.PACKAGES
        for file in (ROOT / package).rglob("*.py")
    }
    assert modules == {name for name in expected if not name.endswith("__main__")}
    text = (site / "api" / "realgen_jax.objectives.html").read_text()
    assert "Return the objective named by" in text


def test_pages_load_nothing_from_elsewhere(site):
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    loaded = []
    for file in files:
        text = file.read_text()
        loaded += re.findall(r'<(?:script|img|iframe)[^>]* src="?(https?:)?//', text)
        loaded += re.findall(r'<link[^>]* rel="?stylesheet[^>]* href="?(https?:)?//', text)
        loaded += re.findall(r"url\(['\"]?(https?:)?//|@import", text)
    assert len(files) > 40
    assert loaded == []


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "docs/files.md#loras", "files.md#loras"),
        ("index.md", "realgen_jax/embedded/README.md", "embedded.md"),
        ("training.md", "../scripts/train.py", "source/scripts/train.py.md"),
        ("embedded.md", "../../README.md#what-the-demo-shows", "index.md#what-the-demo-shows"),
        ("training.md", "files.md", "files.md"),
        ("training.md", "no_such_file.md", "no_such_file.md"),
        ("training.md", "https://arxiv.org", "https://arxiv.org"),
        ("training.md", "#resuming", "#resuming"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(pages, page, link, expected):
    assert pages.rewrite(page, f"see [this]({link}).") == f"see [this]({expected})."
