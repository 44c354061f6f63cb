"""The ways in which this project can run one version: what every row chooses its headline from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import click
import torch

from bench.facts import cpu_flags
from model_store.artefacts import find_artefacts, machine_key, read_artefact
from model_store.store import ModelStore
from models.forecaster import Forecaster
from models.runtimes.cuda_graph import CudaGraphs
from models.runtimes.functions import Executable
from models.runtimes.kinds import FP32_EAGER, KINDS, platform_name
from training import candle_files
from training.export import export
from training.sample_data import write_samples

_WINDOWS: Final = 14


def worth_exporting(device: str) -> Mapping[str, Sequence[str]]:
    """What is exported before anything is measured, by family: what wins on a machine like this one, no more."""
    if torch.device(device).type == "cuda":
        return {"kronos": ("eager-bfloat16",), "toto": ("eager-bfloat16",)}
    if {"avx512_bf16", "amx_bf16"} & set(cpu_flags()):
        return {"kronos": ("compiled-int8", "compiled-bfloat16"), "toto": ("eager-bfloat16",)}
    return {"kronos": ("compiled-int8",), "toto": ()}


def export_all(store: ModelStore, reference: str, labels: Sequence[str], home: Path, device: str) -> None:
    """Artefacts of a version, each judged on the sample candles; one that fails is left out, aloud."""
    if not labels:
        return
    samples = home / "samples"
    if not samples.is_dir():
        write_samples(samples)
    series, _ = candle_files.load(samples)
    for label in labels:
        try:
            export(store, reference, KINDS[label], series, key=machine_key(home), device=device, windows=_WINDOWS)
        except Exception as error:  # noqa: BLE001 - one contender less, not every row
            click.echo(f"{reference} goes without {label}: {error}", err=True)


def contenders(store: ModelStore, reference: str, home: Path, device: str) -> dict[str, Forecaster]:
    """Eager float32, every artefact, and graphs on a GPU, by runtime and dtype as the service names them."""
    version = store.load(reference)
    eager = version.build(device)
    assert isinstance(eager, Executable)
    place = platform_name(torch.device(device))
    artefacts = find_artefacts(store, reference, platform=place, torch_version=torch.__version__)
    labels = list(artefacts)
    if torch.device(device).type == "cuda":
        graphs = [label for label in KINDS if label.startswith("cuda_graph-")]
        labels += [label for label in graphs if label.replace("cuda_graph", "eager") in (FP32_EAGER, *artefacts)]
    found: dict[str, Forecaster] = {FP32_EAGER: eager}
    for label in labels:
        kind = KINDS[label]
        files = {}
        if label in artefacts:
            files = read_artefact(store, artefacts[label], native=kind.native, key=machine_key(home))
        functions = kind.load(eager.decoder, files, torch.get_num_threads())
        if isinstance(functions, CudaGraphs):
            functions.capturing = True  # every side is warmed up before it is timed
        found[label] = eager.executed_by(functions, fours=kind.fours)
    return {label.replace("-", " "): forecaster for label, forecaster in found.items()}
