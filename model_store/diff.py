"""Two versions side by side."""

from collections.abc import Iterator, Mapping
from typing import Any

from model_store.manifest import Evaluation, Manifest, Metric

Row = tuple[str, str, str]  # what, here, there


def differences(
    one: Manifest, other: Manifest, config: Mapping[str, Any], other_config: Mapping[str, Any]
) -> list[Row]:
    """What differs of origin, limits, serving defaults, config, training and files, and every score of both."""
    left, right = _facts(one, config), _facts(other, other_config)
    names = list(dict.fromkeys([*left, *right]))
    return [
        (name, left.get(name, "-"), right.get(name, "-"))
        for name in names
        if left.get(name) != right.get(name) or name.startswith("evaluations.")
    ]


def _facts(manifest: Manifest, config: Mapping[str, Any]) -> dict[str, str]:
    content = manifest.model_dump(mode="json", include={"origin", "limits", "serving", "training", "created_at"})
    files = {name: f"{entry.bytes} bytes, {entry.sha256[:12]}" for name, entry in manifest.files.items()}
    scores = {each.windows: _scores(each) for each in manifest.evaluations}
    return dict(_flat("", {**content, "config": config, "files": files, "evaluations": scores}))


def _scores(evaluation: Evaluation) -> dict[str, str]:
    span = f"{evaluation.start[:10]} to {evaluation.end[:10]}, {evaluation.origins} origins"
    return {"windows": span, **{name: _score(metric) for name, metric in evaluation.metrics.items()}}


def _score(metric: Metric) -> str:
    interval = "" if metric.low is None or metric.high is None else f" [{metric.low:.4g}, {metric.high:.4g}]"
    naive = "" if metric.naive is None else f", naive {metric.naive:.4g}"
    return f"{metric.value:.4g}{interval}{naive}"


def _flat(prefix: str, content: Any) -> Iterator[tuple[str, str]]:
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _flat(f"{prefix}.{name}" if prefix else name, value)
    elif content is not None:
        yield prefix, ", ".join(map(str, content)) if isinstance(content, list) else str(content)
