"""Prometheus' own tools, and where what is tested lies."""

import shutil
import subprocess
from pathlib import Path

import pytest

MONITORING = Path(__file__).parents[2] / "monitoring"
RULES = sorted((MONITORING / "rules").glob("*.yml"))


def binary(name: str) -> str:
    """Where a program is, as Debian calls it; it comes with Prometheus or Alertmanager."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing: apt-get install --no-install-recommends prometheus prometheus-alertmanager")
    return found


def check(*command: str, text: str | None = None) -> str:
    """What a tool says of something; the test fails if it finds fault with it."""
    done = subprocess.run([binary(command[0]), *command[1:]], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
