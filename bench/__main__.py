"""Print the table of the numbers to reach, and write it beside: python -m bench --help."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import click

from bench import adapters, capacity, curves, evaluation, floor, forecasts, http, loading, training
from bench.published import KRONOS, TOTO_BASE, toto_config
from bench.run import RESULTS, Measure, run

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
    "load-toto-base": partial(loading.load, name="toto-base", family="toto", config=toto_config(TOTO_BASE)),
    "load-kronos-base": partial(loading.load, name="kronos-base", family="kronos", config=KRONOS["base"]),
    "adapters-toto": partial(adapters.adapters, family="toto"),
    "adapters-kronos": partial(adapters.adapters, family="kronos"),
    "training-toto": training.toto_step,
    "training-kronos": training.kronos_step,
    "evaluation-toto": evaluation.toto,
    "evaluation-kronos": evaluation.kronos,
    "tuning-kronos": evaluation.tuning,
    "http-overhead": http.overhead,
    "http-load": http.under_load,
    "http-cached": http.cached,
    "http-latest": http.latest,
    "http-fastapi": http.against_plain_fastapi,
    "capacity-replicas": capacity.replicas,
    "capacity-redis": capacity.redis,
    "capacity-memory": capacity.memory,
    "curve-paths": curves.curve_of_paths,
    "curve-symbols": curves.curve_of_symbols,
    "curve-toto-symbols": curves.curve_of_toto_symbols,
    "curve-context": curves.curve_of_context,
}


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


if __name__ == "__main__":
    main()
