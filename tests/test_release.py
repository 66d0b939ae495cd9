"""What a release says about itself agrees, and the files that other programs read are valid."""

import re
import tomllib

import pytest
import yaml

from tests.helpers.goldens import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] == str(citation["version"]) == released[0]
    assert PROJECT["license"] == citation["license"]


def test_the_citation_names_the_papers_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    papers = {entry["url"].rpartition("/")[2] for entry in citation["references"]}
    section = (ROOT / "README.md").read_text().partition("## Licence and citation")[2]
    assert papers == set(re.findall(r"\d{4}\.\d{5}", section))


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_issue_templates_are_forms(file):
    form = yaml.safe_load(file.read_text())
    if file.stem == "config":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= set(form)
    assert all({"type", "id", "attributes"} <= set(field) for field in form["body"])


def test_the_images_copy_what_the_package_needs():
    text = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in names)
    packages = {"realgen_jax", "reward_bridge", "scripts", "configs"}
    assert {"pyproject.toml", "setup.py", "constraints.txt", *packages} <= names
    # Extras that an image installs exist.
    extras = {
        extra for group in re.findall(r"/source\[(.*?)\]", text) for extra in group.split(",")
    }
    assert extras == {"torch", "cuda"}
    assert extras <= set(PROJECT["optional-dependencies"])
