"""Schemathesis against a running service: what the OpenAPI documents of both ports say is what both ports do.

python -m bench.fuzz --max-examples 500; whatever it does not know is an option of `schemathesis run`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.service import Service, start_naive_service
from service.app import create_admin_app, create_app
from service.settings import Settings

_CONFIG: Final = Path(__file__).with_suffix(".toml")
_PHASES: Final = "examples,coverage,fuzzing,stateful"


def fuzz(service: Service, options: Sequence[str]) -> list[str]:
    """What failed, as Schemathesis reports it, one text a port; empty where nothing did."""
    with tempfile.TemporaryDirectory(prefix="candlecast-fuzz-") as folder:
        app = create_app(Settings(home=Path(folder)))
        described = ((app, service.url), (create_admin_app(app.state.services), service.admin_url))
        path = Path(folder) / "openapi.json"
        return [report for each, url in described if (report := _fuzz(each.openapi(), url, path, options))]


def _fuzz(document: Mapping[str, Any], url: str, path: Path, options: Sequence[str]) -> str:
    # Schemathesis 4.32 rewrites tuples of answers for draft 4, and then refuses them as no OpenAPI 3.1.
    # Keys are off on loopback, so that none is missing; tests/service/test_security.py asks every route with them on.
    unsaid, text = {"prefixItems", "security"}, json.dumps(document)
    document = json.loads(text, object_hook=lambda found: {key: found[key] for key in found if key not in unsaid})
    path.write_text(json.dumps(document))
    program = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(_CONFIG), "run", str(path)]
    command = [*program, "--url", url, "--phases", _PHASES, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent)
    return done.stdout + done.stderr if done.returncode else ""


def main() -> None:
    """Exit 1, and print what failed, if anything did."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--max-examples", type=int, default=500, help="per operation and phase")
    options, others = parser.parse_known_args()
    with (
        tempfile.TemporaryDirectory(prefix="candlecast-") as folder,
        start_naive_service(Path(folder), {"CANDLECAST_WATCH": "BTC-USDT:naive:3"}) as service,
    ):
        reports = fuzz(service, ["--max-examples", str(options.max_examples), *others])
    sys.exit("\n".join(reports) or None)


if __name__ == "__main__":
    main()
