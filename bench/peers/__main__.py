"""Ours against other people's servers: python -m bench.peers --python .venv-peers/bin/python

They live in an environment of their own, since what they pin would pull ours back by years.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import click

from bench.http import against_server
from bench.rows import Row
from bench.run import RESULTS, run
from bench.workbench import Workbench

MODULES: Final = {"litserve": "lit", "bentoml": "bento", "ray": "ray_serve"}
ENVELOPES: Final = {"bentoml": b'{"bodies": [%b]}'}
TITLES: Final = {"litserve": "LitServe", "bentoml": "BentoML", "ray": "Ray Serve"}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--python", default=".venv-peers/bin/python", show_default=True, help="Interpreter that has the peers.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(MODULES)))
@click.option("--quick", is_flag=True, help="Shorter loads, wider intervals.")
@click.option("--results", default=RESULTS, type=click.Path(file_okay=False, path_type=Path))
def main(python: str, device: str, only: Sequence[str], quick: bool, results: Path) -> None:
    """Measure this service beside the reference predictor in LitServe, BentoML and Ray Serve."""
    measures = {name: partial(_against, name=name, python=python) for name in (only or MODULES)}
    run(measures, device, quick, results, kind="-peers")


def _against(bench: Workbench, name: str, python: str) -> list[Row]:
    command = [python, "-m", f"bench.peers.{MODULES[name]}", "--device", bench.device]
    title = f"the reference predictor in {TITLES[name]}"
    return [against_server(bench, title, command, ENVELOPES.get(name, b"%b"))]


if __name__ == "__main__":
    main()
