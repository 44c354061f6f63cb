"""A recipe: everything that decides a training run, in one TOML file."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from models.candles import COLUMNS
from training.losses import LossName
from training.tuning import ADAPTERS_ALONE, TuneTable


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataTable(_Strict):
    """Which candles: one folder, which the split divides, or one for each part, which do so themselves."""

    folder: Path | None = None
    train_root: Path | None = None
    val_root: Path | None = None
    test_root: Path | None = None
    symbols: tuple[str, ...] | None = Field(
        None, min_length=1, description="To train on, beside which are those held out; default: all there are."
    )
    interval: str = "1d"
    calendar: str = "auto"
    adjust: bool = Field(False, description="Scale by the adjusted close where a file has one.")
    undo_splits: bool = Field(False, description="Divide what came before a suspected split by its ratio.")

    @property
    def roots(self) -> tuple[Path | None, Path | None, Path | None]:
        """Folders of train, val and test."""
        return self.train_root, self.val_root, self.test_root

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [root is not None for root in self.roots]
        if any(given) if self.folder else not (given[0] and given[2]):
            raise ValueError("give folder alone, or train_root, test_root and maybe val_root")
        return self


class Phase(_Strict):
    """One optimisation: AdamW, whose rate rises, stays and decays by the step alone: the same recipe, the same run."""

    steps: int = Field(gt=0)
    max_seconds: float | None = Field(None, gt=0, description="A guard: what takes longer ends early, and says so.")
    learning_rate: float = Field(gt=0)
    batch_rows: int = Field(32, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the phase in which the rate rises.")
    decay: float = Field(0.2, gt=0, le=1, description="Share of the phase in which it falls, along a cosine.")
    floor: float = Field(0.0, ge=0, le=1, description="Share of the rate that is left at the end.")
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    accumulate: int = Field(1, gt=0, description="Pieces in which a batch passes the network, to need less memory.")
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint: bool = Field(False, description="Run each layer again in the backward pass instead of keeping it.")
    compile: bool = Field(False, description="Compile the loss, which takes minutes and gains little on a CPU.")
    ema: float | None = Field(None, gt=0, lt=1, description="Publish the average of the weights, with this decay.")
    save_every: int = Field(100, gt=0, description="Steps after which a killed run need not start anew.")

    @model_validator(mode="after")
    def _pieces_have_rows(self) -> Self:
        if self.batch_rows % self.accumulate:
            raise ValueError(f"{self.batch_rows} rows do not make {self.accumulate} equal pieces")
        return self

    @model_validator(mode="after")
    def _rises_before_it_falls(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are more than the whole phase")
        return self


class ObjectiveTable(_Strict):
    """What the windows of training are."""

    loss: LossName = Field("nll", description="Toto: what the mixture is fitted by.")
    bars: tuple[int, ...] = Field((1,), description="Toto: candles merged into one; each window picks one of them.")
    ahead: int | None = Field(None, gt=0, description="Kronos: candles after the lookback; default: the horizon.")
    weights: tuple[float, ...] = Field(
        (1.0,) * len(COLUMNS),
        min_length=len(COLUMNS),
        max_length=len(COLUMNS),
        description="Kronos: how much open, high, low, close, volume and amount count in the tokenizer's errors.",
    )
    mirrored: bool = Field(False, description="Windows (Kronos: bars) may as well have moved the other way.")
    simulated: float = Field(0.0, ge=0, le=1, description="Share of windows from simulated markets, each a new one.")


class ServingTable(_Strict):
    """Defaults of request parameters, stored in the manifest where given."""

    samples: int | None = Field(None, gt=0)
    temperature: float | None = Field(None, gt=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stratified: bool | None = None
    lookback: int | None = Field(None, gt=0)
    horizon: int | None = Field(None, gt=0)
    aggregate: str | None = None


_PHASES: Final = {"toto": {"network"}, "kronos": {"tokenizer", "predictor"}}
_IGNORED: Final = {"toto": {"ahead", "weights", "temperature", "top_p", "top_k"}, "kronos": {"loss", "bars"}}


class EvaluateTable(_Strict):
    """Rolling origins and sampling of the evaluation that is published with the weights."""

    stride: int = Field(gt=0, description="Candles between the origins of the test.")
    unseen_stride: int = Field(gt=0, description="The same for unseen symbols, which are fewer.")
    baseline_stride: int = Field(12, gt=0, description="Of the drift baseline, where the test makes too few blocks.")
    samples: int = Field(64, gt=0)
    batch_rows: int = Field(32, gt=0)


class SelectTable(_Strict):
    """Which weights are published: those of the last phase whose forecasts of the val part had the lowest CRPS."""

    every: int = Field(gt=0, description="Steps between two judgements.")
    stride: int = Field(gt=0, description="Candles between the origins.")
    samples: int = Field(32, gt=0)
    keep: int = Field(3, gt=0, description="How many of the best weights stay on disk until the run is published.")
    patience: int | None = Field(None, gt=0, description="Judgements without a better one after which the run ends.")


Value = bool | int | float | str
_SEARCHED: Final = ("phases", "objective", "network", "tune", "serving")  # all else decides what is judged, or how


class Knob(_Strict):
    """What a search may give one setting: whole numbers or fractions from `low` to `high`, or one of `choices`."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = Field(False, description="Equal ratios are equally likely.")
    choices: tuple[Value, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.low is None or self.high is None:
            if self.low is not None or self.high is not None or self.log or len(self.choices) < 2:
                raise ValueError("a searched setting has low and high, or two choices or more")
        elif self.choices or self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("a range has no choices, and goes up from low (with log, from above 0) to high")
        return self

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that say whether all between them are valid."""
        return self.choices or tuple(end for end in (self.low, self.high) if end is not None)


class Recipe(_Strict):
    """See training/recipes/*.toml."""

    name: str
    family: Literal["toto", "kronos"]
    seed: int = 0
    threads: int | None = Field(None, gt=0, description="Of torch; default: one per core.")
    context: int = Field(gt=1)
    horizon: int = Field(gt=0)
    data: DataTable
    split: dict[str, Any] = {}
    network: dict[str, Any] = Field({}, description="config.json of the version, as its family stores it.")
    tune: TuneTable | None = Field(None, description="In the network's place; by default training starts from scratch.")
    phases: dict[str, Phase]
    objective: ObjectiveTable = ObjectiveTable()
    select: SelectTable | None = Field(None, description="By default the last weights are published.")
    evaluate: EvaluateTable
    serving: ServingTable = ServingTable()
    search: dict[str, Knob] = Field(
        {}, exclude=True, description="For candlecast tune, by setting, such as phases.network.learning_rate."
    )

    @model_validator(mode="after")
    def _phases_of_the_family(self) -> Self:
        without_tokenizer = self.tune is not None and set(self.phases) == _PHASES[self.family] - {"tokenizer"}
        if set(self.phases) != _PHASES[self.family] and not without_tokenizer:
            raise ValueError(f"{self.family} has the phases {sorted(_PHASES[self.family])}, not {sorted(self.phases)}")
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if bool(self.network) == bool(self.tune):
            raise ValueError("give network, to train from scratch, or tune, to go on from a version in the store")
        return self

    @model_validator(mode="after")
    def _nothing_that_is_ignored(self) -> Self:
        unused = _IGNORED[self.family] & {*_changed(self.objective), *_changed(self.serving)}
        if self.tune and self.tune.train != "lora":
            unused |= ADAPTERS_ALONE & set(_changed(self.tune))
        if unused:
            raise ValueError(f"{', '.join(sorted(unused))} would change nothing here")
        return self

    @model_validator(mode="after")
    def _one_split(self) -> Self:
        if self.data.folder is None and set(self.split) - {"unseen"}:
            raise ValueError("with a folder for each part, the split has unseen at most")
        return self

    @model_validator(mode="after")
    def _searches_what_is_there(self) -> Self:
        for name, knob in self.search.items():
            for value in knob.ends:
                self.with_settings({name: value})
        return self

    def with_settings(self, settings: Mapping[str, Value]) -> Self:
        """This recipe with some of its settings replaced, each named like phases.network.steps; it searches nothing.

        ValueError where it has no such setting, or not with this value.
        """
        content = self.model_dump()
        for path, value in settings.items():
            *tables, name = path.split(".")
            table: Any = content if path.startswith(_SEARCHED) else {}
            for each in tables:
                table = table.get(each) if isinstance(table, dict) else None
            if not isinstance(table, dict) or not tables or name not in table:
                raise ValueError(f"the recipe has no setting {path!r} to be searched")
            table[name] = value
        return self.model_validate(content)

    def with_roots(self, train: Path, val: Path | None, test: Path) -> Self:
        """This recipe on other candles, a folder for each part."""
        roots = {"folder": None, "train_root": train, "val_root": val, "test_root": test}
        content = self.model_dump()
        split = {name: value for name, value in self.split.items() if name == "unseen"}
        return self.model_validate(content | {"data": content["data"] | roots, "split": split})


def _changed(table: BaseModel) -> Iterator[str]:
    """Settings that differ from their defaults."""
    fields = type(table).model_fields.items()
    return (name for name, field in fields if getattr(table, name) != field.default)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file; pydantic's ValidationError names every wrong key."""
    return Recipe.model_validate(_read_toml(path))


def read_search(path: Path) -> dict[str, Knob]:
    """The `[search]` of a TOML file, which need not be a recipe."""
    return TypeAdapter(dict[str, Knob]).validate_python(_read_toml(path).get("search", {}))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def parse_recipe(text: str) -> Recipe:
    """The same of TOML that is at hand."""
    return Recipe.model_validate(tomllib.loads(text))
