"""The house rules that a reviewer would otherwise have to remember: who imports whom, and what nothing is called."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT: dict[str, set[str]] = {
    "models": set(),
    "model_store": {"models"},
    "training": {"model_store", "models"},
    "service": {"model_store", "models"},
    "feeds": {"training", "models"},
    "candlecast_client": set(),
    "bench": {"training", "service", "model_store", "models", "candlecast_client"},
}
HOMES = {"candlecast_client": ROOT / "client"}  # a distribution of its own; the others lie in ROOT
PACKAGES = [name for name in MAY_IMPORT if (HOMES.get(name, ROOT) / name).is_dir()]
REQUIRED = ("models", "model_store", "training", "service")
NO_HTTP_NO_STATE = {"fastapi", "starlette", "uvicorn", "redis", "httpx", "requests", "pydantic", "os", "socket"}
VAGUE = re.compile(r"utils?|helpers?|core|common|managers?|misc|.*v\d+")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|Users|work)/[^\s\"']*")
WRITTEN_HERE = (".py", ".toml", ".txt", ".lock", ".md", ".yml", ".yaml", ".json", ".html", ".js")
NOT_OURS = {
    ".venv",
    ".venv-peers",
    ".venv-audit",
    ".venv-freqtrade",
    ".venv-nautilus",
    ".git",
    "var",
    "data",
    "artifacts",
    "dist",
}


def sources(package: str) -> list[Path]:
    return sorted((HOMES.get(package, ROOT) / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in the file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def offences(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(package)
        for line, name in imported(path)
        if name.partition(".")[0] in forbidden
    ]


@pytest.mark.parametrize("package", REQUIRED)
def test_the_four_packages_exist(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_what_lies_above_or_beside_it(package: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package} | {"candlecast", "tests"}
    assert offences(package, forbidden) == []


def test_models_knows_no_http_no_redis_no_environment() -> None:
    assert offences("models", NO_HTTP_NO_STATE) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_the_reference_implementations(package: str) -> None:
    assert package == "bench" or offences(package, {"toto", "model", "gluonts", "lightning"}) == []


def test_the_client_needs_nothing_but_httpx_and_pandas() -> None:
    allowed = sys.stdlib_module_names | {"candlecast_client", "httpx", "pandas"}
    names = {name.partition(".")[0] for path in sources("candlecast_client") for _, name in imported(path)}
    assert names - allowed == set()


def test_the_command_line_imports_a_package_only_when_its_verb_is_called() -> None:
    tree = ast.parse((ROOT / "candlecast.py").read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} & {*MAY_IMPORT, "torch", "pandas", "matplotlib"} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_has_a_name_that_says_nothing(package: str) -> None:
    assert [str(p.relative_to(ROOT)) for p in sources(package) if VAGUE.fullmatch(p.stem)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_of_code_is_a_package_that_imports(package: str) -> None:
    for folder in sorted({path.parent for path in sources(package)}):
        assert (folder / "__init__.py").is_file(), f"{folder.relative_to(ROOT)} has no __init__.py"
        importlib.import_module(".".join(folder.relative_to(HOMES.get(package, ROOT)).parts))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_in_its_first_line(package: str) -> None:
    silent = [p for p in sources(package) if not ast.get_docstring(ast.parse(p.read_text()))]
    assert [str(path.relative_to(ROOT)) for path in silent] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_is_relative(package: str) -> None:
    relative = [(str(p.relative_to(ROOT)), name) for p in sources(package) for _, name in imported(p) if name[0] == "."]
    assert relative == []


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    files = [ROOT / "Makefile", ROOT / ".ci" / "run"]
    for entry in ROOT.iterdir():
        if entry.name not in NOT_OURS:
            files += [p for p in (entry.rglob("*") if entry.is_dir() else [entry]) if p.suffix in WRITTEN_HERE]
    ours = [p for p in files if p != Path(__file__) and not NOT_OURS & set(p.relative_to(ROOT).parts)]
    found = [f"{p.relative_to(ROOT)}: {match[0]}" for p in ours for match in MACHINE_PATH.finditer(p.read_text())]
    assert found == []
