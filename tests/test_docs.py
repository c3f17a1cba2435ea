"""The pages: their snippets run, links lead somewhere; names, signatures, options and messages are the package's own.

A ```` ```python ```` block may follow an HTML comment: ``<!-- not run: REASON -->``, or ``<!-- first: CODE -->`` with what the
reader is not shown. The blocks of a page share one namespace, in a folder of their own.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import nn

import resnet_fused
from resnet_fused import backends, cli, functional, info, models
from resnet_fused.backends.kernels import Kernels
from resnet_fused.plans import choice

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "docs").is_dir():
    pytest.skip("the pages are part of the source tree only", allow_module_level=True)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, *(page for folder in ("benchmarks", "examples") for page in sorted((ROOT / folder).rglob("*.md")))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMENT = re.compile(r"<!--\s*(not run|first):(.*?)-->\s*\Z", re.S)


def named(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def words(text: str) -> str:
    return " ".join(text.split())


class Block(NamedTuple):
    """A fenced block; ``kind`` and ``told`` are of the comment in front of it."""

    line: int
    language: str
    code: str
    kind: str
    told: str


def blocks(page: Path) -> Iterator[Block]:
    text, end = page.read_text(encoding="utf-8"), 0
    for found in FENCED.finditer(text):
        comment = COMMENT.search(text, end, found.start())
        kind, told = comment.groups() if comment else ("", "")
        yield Block(text.count("\n", 0, found.start()) + 1, found[1], found[2], kind, told.strip())
        end = found.end()


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


@named([page for page in PAGES if "```python" in page.read_text(encoding="utf-8")])
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (backends, choice):  # what a snippet sets is in force for the rest of its page
        monkeypatch.setattr(module, "_current", None)
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.language != "python":
            continue
        where = f"{page.name}, line {block.line}"
        if block.kind == "not run":
            assert len(block.told.split()) > 1, f"{where}: expected a reason why it is not run, got {block.told!r}"
            compile(block.code, where, "exec")
            continue
        if block.kind == "first":
            exec(compile(block.told, f"{where}, comment", "exec"), namespace)
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)


@named(PAGES)
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "device_name", str)  # the GPU of a reader
    for block in blocks(page):
        if block.language in ("", "sh"):
            for command in block.code.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(command, comments=True) or [""]
                if program == "resnet-fused":
                    cli._parser().parse_args(arguments)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named(LINKING)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}: no such file"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}: no such heading"


def check_name(dotted: str) -> None:
    found: object = resnet_fused
    for i, name in enumerate(parts := dotted.split(".")):
        if hasattr(found, name):
            found = getattr(found, name)
            continue
        module = ".".join(["resnet_fused", *parts[: i + 1]])
        assert importlib.util.find_spec(module), f"{module}: no such name"
        try:
            found = importlib.import_module(module)
        except ImportError:  # of another package that it needs
            return


@named(PAGES)
def test_names_exist(page: Path) -> None:
    """``resnet_fused.NAME`` anywhere; paths of the source tree and names of tests between backticks."""
    text = page.read_text(encoding="utf-8")
    for dotted in re.findall(r"(?<![\w./-])resnet_fused\.([A-Za-z]\w*(?:\.\w+)*)", text):
        check_name(dotted)
    quoted = re.findall(r"`([^`\s]+)`", prose(page))
    defined = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    for word in quoted:
        if re.match(r"(resnet_fused|csrc|tests|benchmarks|build_backend|examples|docs)/", word):
            assert any(ROOT.glob(word.rstrip("/"))), f"{word}: no such file"
        elif re.fullmatch(r"test_\w+", word):
            assert word in defined, f"{word}: no such test"


def test_the_tables_of_what_was_tried_name_tests_that_exist() -> None:
    table = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8").split("## Conventions")[1]
    named = 0
    for row in table.splitlines():
        text = ""
        for file, name in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", row):  # a file stands until the next one
            text = (ROOT / "tests" / file).read_text(encoding="utf-8") if file else text
            assert f"def {name}(" in text, f"{name}: {row}"
            named += 1
    assert named > 80


def test_kernels_of_the_walk_through_exist() -> None:
    called = re.findall(r"\bk\.(\w+)", (ROOT / "docs" / "plans.md").read_text(encoding="utf-8"))
    assert called and not [name for name in called if not hasattr(Kernels, name)]


def test_excerpts_are_of_the_sources() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "resnet_fused").rglob("*.py"))
    for block in blocks(ROOT / "docs" / "kernels.md"):
        if not block.language:
            assert textwrap.indent(block.code, "    ") in sources or block.code in sources, block.code


# api.md


@pytest.fixture(scope="module")
def api() -> str:
    return (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def signature(value: Any) -> str:
    if getattr(value, "__init__", None) is nn.Module.__init__:  # takes nothing, and says it takes everything
        return "()"
    found = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return words(str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty)))


def test_every_public_name_has_its_signature(api: str) -> None:
    shown = {name: words(given) for name, given in re.findall(r"^- `(\w+)(\([^`]*\))`", api, re.M)}
    functions = {name: getattr(functional, name) for name in ("conv_bn_relu", "bn_relu", "bn_add_relu", "add_relu")}
    public = {name: getattr(resnet_fused, name) for name in resnet_fused.__all__} | functions
    for name, value in public.items():
        if not callable(value) or (name in models.BUILDERS and name != "resnet18"):
            assert f"`{name}`" in api, f"{name}: no entry in docs/api.md"
        else:
            assert shown.get(name) == signature(value), f"docs/api.md: expected {name}{signature(value)}"
    assert not shown.keys() - public.keys()
    assert len({signature(build) for build in models.BUILDERS.values()}) == 1
    own = {name for name, value in vars(functional).items() if getattr(value, "__module__", "") == functional.__name__}
    assert {name for name in own if not name.startswith(("_", "check_"))} == functions.keys()


def test_every_option_of_the_commands_is_told(api: str) -> None:
    (commands,) = (a.choices for a in cli._parser()._actions if isinstance(a.choices, dict))
    for name, parser in commands.items():
        (row,) = re.findall(rf"^\| `resnet-fused {name}.*\|$", api, re.M)
        options = {action.option_strings[0] for action in parser._actions if action.option_strings} - {"-h"}
        assert set(re.findall(r"--[a-z-]+", row.split("|")[1])) == options, name


def test_every_environment_variable_is_told(api: str) -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| `?(.*?)`? \|", api, re.M))
    assert rows.keys() == {name for name, *_ in info.ENVIRONMENT}
    for name, default, _ in info.ENVIRONMENT:
        assert rows[name] == default, name


# install.md


def strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_quoted_messages_are_real() -> None:
    """The first cells between backticks, but for ``…``, are pieces of the package's strings."""
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    sources = [ROOT / "setup.py", *(ROOT / "build_backend").glob("*.py"), *(ROOT / "resnet_fused").rglob("*.py")]
    known = {text for path in sources for text in strings(path)}
    pieces = [piece.strip() for message in quoted for piece in message.split("…")]
    assert len(quoted) > 10 and not [p for p in pieces if not any(p in text for text in known)]
