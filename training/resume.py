"""Where a run stands, on disk: what was killed goes on as if nothing had happened."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Self

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from model_store.files import sync_directory, write_synced
from model_store.manifest import canonical_json
from training import processes
from training.events import Events
from training.recipe import Recipe

_FACTS: Final = "facts"  # the JSON in a file's header


@dataclass(frozen=True)
class Place:
    """The files of one phase of a run."""

    folder: Path
    phase: str
    events: Path | None = None  # folder of TensorBoard's files, if there are to be any

    @property
    def state(self) -> Path:
        return self.folder / f"{self.phase}.safetensors"

    def best(self, step: int) -> Path:
        """The weights after `step` steps, where they are among the best."""
        return self.folder / f"{self.phase}-best-{step}.safetensors"

    def keep_best(self, steps: Iterable[int]) -> None:
        """Delete all other best weights."""
        kept = {self.best(step) for step in steps}
        for path in self.folder.glob(f"{self.phase}-best-*.safetensors"):
            if path not in kept:
                path.unlink()

    def log(self, step: int) -> "Log":
        """The run's log, as it was after `step` steps of this phase."""
        return Log(self.folder / "training.log", self.phase, step, self.events)


class Log:
    """JSON lines, in the order of phases and steps, whatever was killed and gone on with; TensorBoard has the same."""

    def __init__(self, path: Path, phase: str, step: int, events: Path | None = None) -> None:
        self._path, self._phase = path, phase
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if self._stays(line, step)]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._events = Events(events, map(json.loads, kept)) if events else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events:
            self._events.close()

    def write(self, facts: Mapping[str, Any]) -> None:
        """Append one line."""
        line = {"phase": self._phase, **facts}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._events:
            self._events.write(line)

    def _stays(self, line: str, step: int) -> bool:
        try:
            facts = json.loads(line)
        except ValueError:  # cut short by a kill
            return False
        return bool(facts["phase"] != self._phase or facts["step"] <= step)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which one process at a time holds."""

    path: Path
    tensorboard: Path | None = None  # where the run's events go, in a folder of its name

    def place(self, phase: str) -> Place:
        return Place(self.path, phase, self.tensorboard and self.tensorboard / self.path.name)

    def clear(self) -> None:
        """Forget where the run stands, but not what it logged: the next one starts at the beginning."""
        if processes.rank() == 0:
            for path in self.path.glob("*.safetensors"):
                path.unlink()
        processes.wait()


@contextmanager
def run_folder(runs: Path, recipe: Recipe, data_digest: str, tensorboard: Path | None = None) -> Iterator[RunFolder]:
    """The folder under `runs` of this very recipe on these very candles; RuntimeError while another process has it."""
    content = {"recipe": recipe.model_dump(mode="json"), "data": data_digest}
    path = runs / f"{recipe.name}-{sha256(canonical_json(content)).hexdigest()[:12]}"
    path.mkdir(parents=True, exist_ok=True)
    if processes.rank():  # the first process holds it for all
        yield RunFolder(path, tensorboard)
        return
    with open(path / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"{recipe.name} is being trained by another process, in {path}") from error
        yield RunFolder(path, tensorboard)


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """One file with all of it, under its name only once it is whole."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_suffix(".tmp")
    write_synced(temporary, save(contiguous, metadata={_FACTS: json.dumps(facts)}))
    os.replace(temporary, path)
    sync_directory(path.parent)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()[_FACTS])
