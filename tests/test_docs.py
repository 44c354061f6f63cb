"""What the README and docs/ say is so: commands, links, settings, metrics."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from service.reference import reference
from service.settings import Settings
from tests.test_verbs import VERBS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
READ_BY_THE_COMMANDS = {"CANDLECAST_KEY", "CANDLECAST_URL"}  # the service reads all others
SETTINGS = re.compile(r"^(?:[A-Z_]+=\S+\s+)+")


def shell_lines(page: Path) -> list[str]:
    """Every command in the shell blocks of a page, continuation lines joined."""
    text = "\n".join(BLOCK.findall(page.read_text())).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def commands() -> list[list[str]]:
    """The words of every command, without the settings before it."""
    return [shlex.split(SETTINGS.sub("", line), comments=True) for page in PAGES for line in shell_lines(page)]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_first_screen_shows_make_serve_and_make_test() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:50])
    assert "make serve" in first_screen
    assert "make test" in first_screen


def test_every_make_target_in_the_docs_exists() -> None:
    named = {word for words in commands() if words[0] == "make" for word in words[1:] if "=" not in word}
    assert named
    assert named - targets() == set()


def test_every_verb_and_option_in_the_docs_is_one_of_the_command_line() -> None:
    ours = [words for words in commands() if words[0].rpartition("/")[2] == "candlecast"]
    assert ours
    for words in ours:
        verb = next((verb for verb in (" ".join(words[1:3]), words[1]) if verb in VERBS), None)
        assert verb, words
        known = {name for each in VERBS[verb].params for name in (*each.opts, *each.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words


def test_every_folder_and_service_that_docker_and_kubectl_are_given_exists() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    deployed = [words for words in commands() if words[0] in ("docker", "kubectl")]
    assert deployed
    for words in deployed:
        if words[:2] == ["docker", "compose"] and words[2] != "up":
            assert set(services) & set(words[3:]), words
        if "-k" in words:
            assert (ROOT / words[words.index("-k") + 1] / "kustomization.yaml").is_file(), words


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "NOTICE", "CHANGELOG.md"])
def test_the_documents_are_there_and_not_empty(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_every_link_between_the_documents_leads_somewhere() -> None:
    for page in (*PAGES, *ROOT.glob("*/README.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_reference_is_the_code_s_own() -> None:
    assert (DOCS / "reference.md").read_text() == reference(), "make reference"


def test_every_setting_that_the_docs_name_exists() -> None:
    known = {f"CANDLECAST_{name.upper()}" for name in Settings.model_fields} | READ_BY_THE_COMMANDS
    for page in PAGES:
        assert set(re.findall(r"CANDLECAST_[A-Z_]+", page.read_text())) <= known, page.name


def test_every_json_and_toml_block_can_be_read() -> None:
    for page in PAGES:
        for kind, text in re.findall(r"^```(json|toml)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            json.loads(text) if kind == "json" else tomllib.loads(text)


def test_every_test_that_the_threat_model_names_exists() -> None:
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "security.md").read_text()))
    assert named
    assert {name for name in named if f"def {name}(" not in written} == set()
