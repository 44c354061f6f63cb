"""Print the table of the numbers to reach, and write it beside: python -m bench --help."""

import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import torch

from bench import curves, floor, forecasts, http
from bench.facts import header, machine_facts
from bench.printed import print_report
from bench.rows import Curve, Failure, Report, Row
from bench.workbench import Workbench

Measure = Callable[[Workbench], Iterable[Row | Curve]]

MEASURES: Final[Mapping[str, Measure]] = {
    "start": http.start,
    "kronos-1-path": forecasts.kronos_one_path,
    "kronos-32-paths": forecasts.kronos_many_paths,
    "kronos-16-symbols": forecasts.kronos_many_symbols,
    "toto-quantiles": forecasts.toto_quantiles,
    "toto-mean": forecasts.toto_mean,
    "floor-1-path": partial(floor.kronos_floor, symbols=1, paths=1),
    "floor-32-paths": partial(floor.kronos_floor, symbols=1, paths=32),
    "floor-16-symbols": partial(floor.kronos_floor, symbols=16, paths=1),
    "floor-toto": floor.toto_floor,
    "http-overhead": http.overhead,
    "http-load": http.under_load,
    "http-cached": http.cached,
    "http-fastapi": http.against_plain_fastapi,
    "curve-paths": curves.curve_of_paths,
    "curve-symbols": curves.curve_of_symbols,
    "curve-toto-symbols": curves.curve_of_toto_symbols,
    "curve-context": curves.curve_of_context,
}
_QUICK_PACE: Final = 0.2
RESULTS: Final = Path(__file__).parent / "results"


def measure(bench: Workbench, measures: Mapping[str, Measure], machine: Mapping[str, Any]) -> Report:
    """Everything that could be measured; what failed is a Failure and loses nothing else."""
    rows: list[Row] = []
    lines: list[Curve] = []
    failures: list[Failure] = []
    for name, take in measures.items():
        click.echo(f"  {name} …", err=True)
        try:
            for found in take(bench):
                if isinstance(found, Row):
                    rows.append(found)
                else:
                    lines.append(found)
        except Exception as error:  # noqa: BLE001 - one measurement must not lose the others
            traceback.print_exc()
            failures.append(Failure(name, f"{type(error).__name__}: {error}"))
    return Report(machine, rows, lines, failures)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="cpu", show_default=True, help="Torch device of both sides.")
@click.option("--only", multiple=True, type=click.Choice(list(MEASURES)), help="Once per measurement.")
@click.option("--quick", is_flag=True, help="Under three minutes: fewer rounds, shorter loads, wider intervals.")
@click.option(
    "--results", default=RESULTS, type=click.Path(file_okay=False, path_type=Path), help="Folder of the JSON."
)
def main(device: str, only: Sequence[str], quick: bool, results: Path) -> None:
    """Measure this project beside the reference implementations and the floor of the hardware."""
    run({name: MEASURES[name] for name in (only or MEASURES)}, device, quick, results)


def run(measures: Mapping[str, Measure], device: str, quick: bool, results: Path, kind: str = "") -> None:
    """Measure, print, write; exit status 1 if a measurement failed."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA device")
    warnings.simplefilter("ignore")  # the reference implementations warn on every call
    facts = machine_facts(device)
    click.echo(header(facts))
    with Workbench(device, _QUICK_PACE if quick else 1.0) as bench:
        report = measure(bench, measures, {**facts, "quick": quick})
    print_report(report)
    day = facts["date"][:10]
    click.echo(f"written: {report.write(results, f'{day}-{device}{kind}').name}")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
