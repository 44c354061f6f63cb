"""The shipped recipes made small: seconds to train, everything else as it is."""

import re
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
_SMALL = {
    "threads": 1,
    "context": 64,
    "horizon": 16,
    "patch_size": 16,
    "stride": 16,
    "embed_dim": 32,
    "num_layers": 2,
    "spacewise_every_n_layers": 2,
    "mlp_hidden_dim": 32,
    "batch_rows": 8,
    "samples": 8,
}


def small_recipe(family: str, data: Path, tables: str = "", **values: object) -> str:
    """TOML; `values` replace every key of their name (in the evaluation, stride is 800), `tables` are added."""
    text = (RECIPES / f"{family}-demo.toml").read_text()
    for name, value in {"folder": f'"{data}"', **_SMALL, **values}.items():
        text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
    rare = "[evaluate]\nstride = 800\nunseen_stride = 800\nbaseline_stride = 800"
    text = re.sub(r"\[evaluate\]\nstride = \d+\nunseen_stride = \d+", rare, text)
    return f"{text}\n{tables}"
