"""What holds for the whole tree: slow libraries are imported late, sentences are whole, links lead somewhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted(p for folder in ("utils", "networks", "scripts") for p in (ROOT / folder).rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = ("sklearn", "scipy", "torchvision", "matplotlib", "pytorch_ood", "tensorboard", "torch._inductor")


STARTED = ("main", "main_oe", "main_poe", "train_model_synthetic_oe", "test_ood_model_syn")
START = """
import importlib, os, sys
import torch
for name in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(name).get_args_parser()
        print(name, *sys.modules)
        break
    os.wait()
"""


@pytest.fixture(scope="module")
def imported():
    """What each script imports until it has read its flags, from a process of its own that begins with torch alone."""
    command = [sys.executable, "-c", START, *STARTED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: {*modules} for name, *modules in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("script", STARTED)
def test_a_script_starts_without_slow_libraries(script, imported):
    assert script in imported[script]
    assert not {*SLOW} & imported[script]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings(path):
    """Every module, public function and public class has one, and none has a quote that a line break left behind."""
    tree = ast.parse(path.read_text())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if not isinstance(node, kinds):
            continue
        text = ast.get_docstring(node)
        name = getattr(node, "name", path.name)
        public = isinstance(node, ast.Module) or (not name.startswith("_") and name not in ("forward", "embed"))
        nested = isinstance(node, ast.FunctionDef) and node not in tree.body
        assert text or not public or nested, f"{path}: {name} has no docstring"
        assert not re.search(r'"\s*\n\s*"', text or ""), f"{path}: {name}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        goal = page if not path else (page.parent / path).resolve()
        assert goal.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(goal), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_list_of_contents_names_every_section(page):
    """A page that begins with one lists its sections in their order."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    listed = re.findall(r"\[([^]]+)\]\(#\S+\)", text.partition("\n## ")[0])
    if listed:
        assert listed == re.findall(r"^## (.+)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_are_there(page):
    """A name in backquotes that starts with a folder of the project is a file, a folder or a pattern of files."""
    names = re.findall(r"`((?:utils|networks|scripts|tests|docs|assets)/[\w./*-]*)`", page.read_text())
    for name in names:
        assert list(ROOT.glob(name.rstrip("/"))), f"{page.name}: {name}"
