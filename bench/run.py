"""Take measurements one after the other; print and write what they found."""

import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import click
import torch

from bench.facts import header, machine_facts
from bench.printed import print_report
from bench.rows import Curve, Failure, Report, Row
from bench.workbench import Workbench

Measure = Callable[[Workbench], Iterable[Row | Curve]]

RESULTS: Final = Path(__file__).parent / "results"
_QUICK_PACE: Final = 0.2


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


def measure(bench: Workbench, measures: Mapping[str, Measure], machine: Mapping[str, Any]) -> Report:
    """Everything that could be measured; what failed is a Failure and loses nothing else."""
    rows: list[Row] = []
    lines: list[Curve] = []
    failures: list[Failure] = []
    for name, take in measures.items():
        click.echo(f"  {name} … ", nl=False, err=True)
        began = time.monotonic()
        try:
            for found in take(bench):
                if isinstance(found, Row):
                    rows.append(found)
                else:
                    lines.append(found)
        except Exception as error:  # noqa: BLE001 - one measurement must not lose the others
            traceback.print_exc()
            failures.append(Failure(name, f"{type(error).__name__}: {error}"))
        click.echo(f"{time.monotonic() - began:.0f} s", err=True)
    return Report(machine, rows, lines, failures)
