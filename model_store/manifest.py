"""The manifest: everything that is known about a version, hashed together with its files."""

import hashlib
import hmac
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.forecaster import Limits

SCHEMA_VERSION: Final = 1
VERSION: Final = re.compile(r"[0-9a-f]{12}")  # of a digest
MANIFEST, CONFIG, WEIGHTS, RUNTIMES = "manifest.json", "config.json", "weights.safetensors", "runtimes"
SCORES = "scores.safetensors"  # of the windows that it was evaluated on, for comparing versions window by window
ADAPTER = "adapter.safetensors"  # of low rank, as it was trained; the weights have it added in


_ADAPTED: Final = {"network", "predictor"}  # the phases of training that adapters may be all of


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]  # it can leave no folder


class FileEntry(_Strict):
    """Size and SHA-256 of one file of the version."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Origin(_Strict):
    """Where the weights come from."""

    kind: Literal["trained", "imported", "child"]
    source: str = Field(description="Recipe, hub id or folder name.")
    revision: str | None = Field(default=None, description="Hub commit, or the parent's version.")
    tokenizer: str | None = Field(default=None, description="Hub id or folder name, where it came apart from source.")
    tokenizer_revision: str | None = Field(default=None, description="Its hub commit.")
    licence: str | None = Field(default=None, description="SPDX identifier of the weights' licence.")


class ModelLimits(_Strict):
    """What the version can take, in candles."""

    min_context: int = Field(ge=1)
    max_context: int = Field(ge=1)
    max_horizon: int = Field(ge=1)
    max_total: int | None = Field(default=None, description="Context + horizon, where they share positions.")

    def room(self, horizon: int) -> int:
        """The longest context before `horizon` steps."""
        return Limits(**self.model_dump()).room(horizon)


class Metric(_Strict):
    """One score beside the naive forecast's on the same origins, with a 95 % block-bootstrap interval."""

    value: float
    naive: float | None = None
    walk: float | None = Field(default=None, description="The EWMA random walk's score.")
    base: float | None = Field(
        default=None,
        description="The score of the version that this one was tuned from, or of an ensemble's best member.",
    )
    low: float | None = None
    high: float | None = None


class Comparison(_Strict):
    """Diebold-Mariano test of one forecast's absolute log-return errors against the naive forecast's, or another's."""

    sentence: str = Field(description="Such as: worse than naive, p = 0.003.")
    statistic: float = Field(description="Positive where the forecast is worse.")
    p_value: float = Field(description="Two-sided.")
    degrees: int = Field(description="Degrees of freedom of the statistic; 0 where the errors are equal.")
    times: int = Field(description="Times of origin; symbols that share one are averaged.")


class Evaluation(_Strict):
    """Rolling-origin scores of one set of windows."""

    windows: str = Field(description="Which windows: test (held-out time) or unseen (held-out symbol and time).")
    symbols: tuple[str, ...]
    start: str
    end: str
    interval: str
    horizon: int
    origins: int
    samples: int | None = None
    crps_estimator: Literal["ensemble", "quantiles"] | None = Field(
        default=None,
        description="Fair over paths, or 2 x mean pinball over even levels; the walk's CRPS is of the same kind.",
    )
    metrics: dict[str, Metric]
    versus_naive: Comparison | None = Field(default=None, description="None where there are too few windows to tell.")
    versus_base: Comparison | None = Field(default=None, description="The same beside what it was tuned from.")
    ranked: Literal["symbols", "times"] | None = Field(
        default=None, description="What rank_ic ranks: symbols at each origin, or where they are few the origins."
    )


class Baseline(_Strict):
    """What the live score compares with: held-out error of one symbol ('*' for all) in blocks of targets."""

    symbol: str
    interval: str
    group: int | None = Field(
        default=None, description="Group of horizons: 0 for steps 1-8, 1 for 9-30, 2 for 31-64, 3 beyond; null: all."
    )
    horizon: int = Field(description="The last step that was scored.")
    n_blocks: int
    mae_log_return: float
    naive_mae_log_return: float
    rho0: float = Field(description="mae_log_return / naive_mae_log_return.")
    sd_block: float = Field(description="Standard deviation of the block means of the scaled paired loss.")
    correlation: float = Field(default=0.0, description="Of the symbols' block means with each other, on average.")
    coverage_80: float
    pinball: dict[str, float]


class TrainingRecord(_Strict):
    """What the weights were fitted on."""

    recipe: dict[str, Any]
    data_digest: str
    symbols: tuple[str, ...] = Field(description="Of this and from start to end, what the base has seen is part.")
    interval: str
    start: str
    end: str
    steps: int
    seconds: float
    seed: int
    notes: tuple[str, ...] = Field(default=(), description="What the recipe does not say: early ends, chosen steps.")
    losses: dict[str, float] = Field(default={}, description="By phase, mean of the last tenth; skill is what counts.")


class SelectedOn(_Strict):
    """What chose settings: a search over some windows, and one test of its winner on later windows. None is the
    test's."""

    settings: dict[str, Any] = Field(description="What was chosen, by the name it has in a recipe.")
    before: str = Field(description="Version whose settings were the current ones, or the recipe that had them.")
    symbols: tuple[str, ...]
    interval: str
    horizon: int
    trials: int = Field(description="Those that ended early are among them.")
    score: str = Field(description="What a trial was judged by: lower is better.")
    search_start: str = Field(description="Days of the first and the last target of the search.")
    search_end: str
    search_windows: int
    decision_start: str = Field(description="The same of the windows that it never saw.")
    decision_end: str
    decision_windows: int
    gain: float = Field(description="1 - the score there / that of the current settings.")
    low: float
    high: float
    confidence: float = Field(description="Of the interval from low to high: paired, by blocks of one horizon.")
    p_value: float = Field(description="Diebold-Mariano test of the same losses.")


class Parity(_Strict):
    """How far an artefact is from the version's float32 functions, executed eagerly."""

    functions: dict[str, float] = Field(description="Largest error of a result over its largest magnitude.")
    equal_tokens: float | None = Field(description="Share of equal tokens; null where none are drawn.")
    windows: int = Field(default=0, description="Calibration windows; the scores below are over their closes.")
    mae_log_return: float | None = None
    mae_log_return_float32: float | None = None
    quantile_bias: dict[str, float] = Field(
        default_factory=dict,
        description="By level: mean of what the quantile moved from float32's, over the mean width of its 80 % band.",
    )
    quantile_shift: dict[str, float] = Field(default_factory=dict, description="The same without signs.")
    quantile_shift_of_a_seed: dict[str, float] = Field(
        default_factory=dict, description="The same when float32 draws other paths; empty where none are drawn."
    )
    budget: dict[str, float] = Field(description="What the numbers above had to stay within.")


class Artefact(_Strict):
    """The manifest of one runtime of one version, beside it and outside its hash."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: str
    version: str
    runtime: Literal["eager", "compiled", "onnx"]
    dtype: Literal["float32", "bfloat16", "int8"]
    platform: str = Field(description="What built and tested it; compiled code runs nowhere else.")
    torch: str
    files: dict[str, FileEntry]
    parity: Parity
    build_seconds: float
    created_at: str
    signature: str = Field(default="", description="HMAC-SHA256 of all else by the key of the machine that built it.")

    @property
    def label(self) -> str:
        return f"{self.runtime}-{self.dtype}"

    def signed(self, key: bytes) -> "Artefact":
        """With the signature that `key` gives."""
        return self.model_copy(update={"signature": self._signature(key)})

    def is_signed_by(self, key: bytes) -> bool:
        return hmac.compare_digest(self.signature.encode(), self._signature(key).encode())

    def _signature(self, key: bytes) -> str:
        content = canonical_json(self.model_dump(mode="json", exclude={"signature"}))
        return hmac.new(key, content, hashlib.sha256).hexdigest()


class Canary(_Strict):
    """A forecast of the version, eager and in float32, of candles that follow from the seed: prices by step."""

    seed: int = Field(ge=0)
    context: int = Field(ge=1, description="Candles before the forecast.")
    low: tuple[float, ...] = Field(description="0.1 quantile of the close.")
    close: tuple[float, ...]
    high: tuple[float, ...] = Field(description="0.9 quantile of the close.")


class Manifest(_Strict):
    """One version. `version` is the first 12 hex digits of the digest of everything else."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    version: str = ""
    symbol: str | None = Field(default=None, description="The one it was trained for alone; null: it is for all.")
    family: Literal["toto", "kronos", "naive", "ensemble"]
    origin: Origin
    limits: ModelLimits
    files: dict[FileName, FileEntry] = Field(json_schema_extra={"additionalProperties": False})
    serving: dict[str, Any] = Field(default_factory=dict, description="Defaults of request parameters.")
    training: TrainingRecord | None = None
    selected_on: SelectedOn | None = Field(default=None, description="Of settings that a search chose.")
    evaluations: tuple[Evaluation, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    canary: Canary | None = None
    created_at: str
    code_revision: str | None = None

    def digest(self) -> str:
        """The version this manifest must carry."""
        return version_of(self.model_dump(mode="json"))

    @property
    def adapts(self) -> tuple[str, float] | None:
        """The version (name@version) that its adapter was trained beside, and the factor that it is added in with.

        None where it has no adapter, or more than that was trained.
        """
        recipe = self.training.recipe if self.training else {}
        tune, phases = recipe.get("tune") or {}, set(recipe.get("phases") or ())
        if ADAPTER not in self.files or self.origin.revision is None or not phases <= _ADAPTED:
            return None
        try:
            return f"{tune['base'].partition('@')[0]}@{self.origin.revision}", tune["alpha"] / tune["rank"]
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):  # nothing checks what a recipe says
            return None

    @property
    def chose_by_val(self) -> bool:
        """Whether the val part had a say: among weights as they were trained, or among settings in a search."""
        return self.selected_on is not None or bool(self.training and self.training.recipe.get("select"))

    def evaluation(self, windows: str) -> Evaluation | None:
        """The evaluation on `windows`, if there is one."""
        return next((e for e in self.evaluations if e.windows == windows), None)


class Alias(BaseModel):
    """What an alias points at: the one thing of a store that is written over."""

    model_config = ConfigDict(frozen=True)

    version: str = Field(pattern=r"^[0-9a-f]{12}$")
    previous: str | None = Field(default=None, pattern=r"^[0-9a-f]{12}$", description="What it pointed at before.")
    share: float | None = Field(default=None, gt=0, le=1, description="Of requests that a shadow forecasts too.")


def version_of(content: Mapping[str, Any]) -> str:
    """The version of a manifest as it was stored: fields that later releases add do not change it."""
    return hashlib.sha256(canonical_json({k: v for k, v in content.items() if k != "version"})).hexdigest()[:12]


def strict_json(data: bytes | bytearray) -> dict[str, Any]:
    """The object that `data` holds; ValueError if it is none, is nested too deeply, or names a key twice."""

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        content = json.loads(data.decode(), object_pairs_hook=_distinct, parse_constant=refused)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    return content


def in_a_line(error: ValueError) -> str:
    """What is wrong first, without the lines that pydantic draws around it."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))[:200]!r}: {first['msg']}"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has {twice[:60]!r} twice")
    return content


def canonical_json(content: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8: equal content gives equal bytes."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
