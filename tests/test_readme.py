"""The README's commands are real: each names a make target or a verb that exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SETTINGS = re.compile(r"^(?:[A-Z_]+=\S+\s+)+")


def commands() -> list[list[str]]:
    """The words of every command in the README's shell blocks, continuation lines joined."""
    text = "\n".join(BLOCK.findall((ROOT / "README.md").read_text())).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    lines = [SETTINGS.sub("", line) for line in lines]
    return [shlex.split(line, comments=True) for line in lines if line and not line.startswith("#")]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def candlecast(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "candlecast.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_the_first_screen_shows_make_serve_and_make_test() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:50])
    assert "make serve" in first_screen
    assert "make test" in first_screen


def test_every_make_target_in_the_readme_exists() -> None:
    named = {word for words in commands() if words[0] == "make" for word in words[1:] if "=" not in word}
    assert named
    assert named - targets() == set()


def test_every_verb_in_the_readme_exists() -> None:
    help_text = candlecast("--help").stdout
    verbs = {words[1] for words in commands() if words[0].rpartition("/")[2] == "candlecast" and len(words) > 1}
    assert {verb for verb in verbs if not re.search(rf"^\s+{re.escape(verb)}\b", help_text, re.MULTILINE)} == set()


def test_every_option_in_the_readme_is_one_its_verb_takes() -> None:
    for words in commands():
        if words[0].rpartition("/")[2] != "candlecast":
            continue
        path = [word for word in words[1:3] if re.fullmatch(r"[a-z][a-z-]*", word)]
        shown = candlecast(*path[:2], "--help")
        if shown.returncode:  # the second word was an argument, not a verb below the first
            shown = candlecast(*path[:1], "--help")
        for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
            assert option in shown.stdout, f"{' '.join(words)}: {option}"


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
