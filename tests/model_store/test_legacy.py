"""Checkpoints of torch.save: read as data or refused; nothing that they hold is ever run."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from bench.published import KRONOS_TINY, TOTO_TINY, random_weights, toto_config, toto_weights
from bench.references import build_toto
from candlecast import main
from model_store.legacy import LegacyRefused
from model_store.manifest import Manifest
from model_store.store import ModelStore
from model_store.upstream import ImportRefused, import_checkpoint

# What a trainer notes beside the weights: its own settings, of another network than the one that it tuned.
TRAINER = {"patch_size": 12, "stride": 6, "spacewise_every_n_layers": 2, "learning_rate": 1e-4, "compile": True}


@pytest.fixture(scope="module")
def toto() -> dict[str, torch.Tensor]:
    """The reference's own state dict, with the wrapper's prefix and its rotary frequencies."""
    return dict(build_toto(TOTO_TINY).state_dict())


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "artifacts")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder / "best_model.pt"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TOTO_TINY))
    return path


def trainers(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The whole of a trainer's best_model.pt."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in list(state.values())[:2]]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    notes = {"epoch": 3, "best_val_loss": 0.5, "metrics": {"pct_mae": 1.161}, "config": TRAINER, "timestamp": "now"}
    return {**notes, "model_state_dict": state, "optimizer_state_dict": optimizer.state_dict(), **changes}


def refused(store: ModelStore, file: Path, match: str, **options: Any) -> None:
    with pytest.raises((ImportRefused, LegacyRefused), match=match) as caught:
        import_checkpoint(store, file, "imported", **options)
    assert "\n" not in str(caught.value)
    assert store.models() == [], "something was stored"


def imported(store: ModelStore, file: Path, **options: Any) -> tuple[Manifest, Any]:
    manifest = import_checkpoint(store, file, "imported", **options)
    return manifest, store.load(f"imported@{manifest.version}")


# -- what is imported ---------------------------------------------------------------------------


def test_a_trainers_best_model_becomes_a_version(
    store: ModelStore, file: Path, config: Path, toto: dict[str, torch.Tensor]
) -> None:
    torch.save(trainers(toto), file)
    manifest, loaded = imported(store, file, config=config, licence="apache-2.0")
    expected = toto_weights(build_toto(TOTO_TINY))
    assert loaded.weights.keys() == expected.keys()
    assert all(torch.equal(loaded.weights[name], expected[name]) for name in expected)
    assert loaded.config == toto_config(TOTO_TINY)
    assert (manifest.origin.source, manifest.origin.licence) == ("best_model.pt", "apache-2.0")


WRAPPED: list[Callable[[dict[str, Any]], Any]] = [
    lambda state: state,
    lambda state: {"state_dict": state},
    lambda state: {"model": {name.removeprefix("model."): value for name, value in state.items()}},
    lambda state: {"model_state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}},
    lambda state: {name.replace("model.", "model._orig_mod."): value for name, value in state.items()},
    lambda state: {name: torch.nn.Parameter(value, requires_grad=True) for name, value in state.items()},
]


@pytest.mark.parametrize("wrap", WRAPPED, ids=["bare", "state_dict", "model", "module", "compiled", "parameters"])
def test_every_wrapping_of_the_same_weights_is_the_same_version_as_their_folder(
    store: ModelStore,
    file: Path,
    config: Path,
    toto: dict[str, torch.Tensor],
    wrap: Callable[[dict[str, Any]], Any],
) -> None:
    save_file(toto, config.with_name("model.safetensors"))
    folder = import_checkpoint(store, config.parent, "imported")
    torch.save(wrap(toto), file)
    assert imported(store, file, config=config)[0] == folder


def test_a_kronos_takes_config_and_tokenizer_from_its_folder(store: ModelStore, file: Path) -> None:
    weights = random_weights("kronos", KRONOS_TINY)
    parts: dict[str, dict[str, torch.Tensor]] = {"predictor": {}, "tokenizer": {}}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    buffers = {"transformer.0.self_attn.rotary.inv_freq": torch.ones(4)}
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in (parts["predictor"] | buffers).items()}}, file)
    (file.parent / "config.json").write_text(json.dumps(KRONOS_TINY["predictor"]))
    (file.parent / "tokenizer").mkdir()
    (file.parent / "tokenizer" / "config.json").write_text(json.dumps(KRONOS_TINY["tokenizer"]))
    save_file(parts["tokenizer"], file.parent / "tokenizer" / "model.safetensors")
    manifest, loaded = imported(store, file)
    assert manifest.family == "kronos"
    assert all(torch.equal(loaded.weights[name], weights[name]) for name in weights)


def test_a_published_config_inside_goes_before_one_beside(
    store: ModelStore, file: Path, toto: dict[str, torch.Tensor]
) -> None:
    inside = TOTO_TINY | {"scale_factor_exponent": 9.0}
    torch.save(trainers(toto, config=inside), file)
    (file.parent / "config.json").write_text(json.dumps(TOTO_TINY))
    assert imported(store, file)[1].config == toto_config(inside)


def test_views_of_one_storage_are_stored_apart(
    store: ModelStore, file: Path, config: Path, toto: dict[str, torch.Tensor]
) -> None:
    sizes = [tensor.numel() for tensor in toto.values()]
    pieces = torch.cat([tensor.flatten() for tensor in toto.values()]).split(sizes)
    flat = {name: piece.view(toto[name].shape) for name, piece in zip(toto, pieces, strict=True)}
    torch.save(flat, file)
    loaded = imported(store, file, config=config)[1]
    assert all(
        torch.equal(loaded.weights[name.removeprefix("model.")], toto[name]) for name in toto if "rot" not in name
    )


# -- what is refused ----------------------------------------------------------------------------


class Hostile:
    """Runs a command when a pickle of it is read by code that lets it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("place", ["top", "beside", "inside"])
def test_a_pickle_that_would_run_code_runs_none(
    store: ModelStore, file: Path, config: Path, toto: dict[str, torch.Tensor], tmp_path: Path, place: str
) -> None:
    hostile = Hostile(tmp_path / "ran")
    content = {"top": hostile, "beside": trainers(toto, metrics=hostile), "inside": toto | {"model.x": hostile}}[place]
    torch.save(content, file)
    refused(store, file, r"names \S*\.system, which may run code", config=config)
    assert not hostile.mark.exists()
    torch.load(file, weights_only=False)
    assert hostile.mark.exists(), "the pickle was harmless, and this test showed nothing"


@pytest.mark.parametrize(
    "content",
    [np.float64(1.0), np.ones(2), Path("x"), torch.nn.Linear(2, 2)],
    ids=lambda content: type(content).__name__,
)
def test_what_only_code_could_rebuild_is_named(
    store: ModelStore, file: Path, config: Path, toto: dict[str, torch.Tensor], content: Any
) -> None:
    torch.save(trainers(toto, metrics=content), file)
    refused(store, file, r"and names \S+, which may run code: .*safetensors\.torch\.save_file", config=config)


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"\x80\x04N.", b"\xff" * 64], ids=["empty", "zip", "pickle", "ff"]
)
def test_a_file_of_something_else_is_refused(store: ModelStore, file: Path, config: Path, data: bytes) -> None:
    file.write_bytes(data)
    refused(store, file, "is no checkpoint of torch.save", config=config)


def test_a_truncated_checkpoint_is_refused(
    store: ModelStore, file: Path, config: Path, toto: dict[str, torch.Tensor]
) -> None:
    torch.save(toto, file)
    file.write_bytes(file.read_bytes()[:-200])
    refused(store, file, "is no checkpoint of torch.save", config=config)


def test_one_wrong_bit_of_a_weight_is_noticed(
    store: ModelStore, file: Path, config: Path, toto: dict[str, torch.Tensor]
) -> None:
    marked = toto | {"model.unembed.bias": torch.full((2048,), 0.123)}
    torch.save(marked, file)
    data, sign = file.read_bytes(), marked["model.unembed.bias"].numpy().tobytes()
    assert data.count(sign) == 1
    file.write_bytes(data.replace(sign, bytes([sign[0] ^ 1]) + sign[1:]))
    refused(store, file, r"is damaged: \S+ does not match its checksum", config=config)


def test_a_compressed_archive_is_refused(store: ModelStore, file: Path, config: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, file)
    with zipfile.ZipFile(file) as saved, zipfile.ZipFile(file.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as packed:
        for name in saved.namelist():
            packed.writestr(name, saved.read(name))
    refused(store, file.with_suffix(".zip"), "is compressed", config=config)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds a list"),
        ({"epoch": 1, "metrics": {"loss": 0.5}}, r"no weights .* but 'epoch' \(int\), 'metrics' \(dict\)"),
        ({"model_state_dict": {}}, "but nothing"),
        ({"state_dict": {"unembed.bias": 1.0}}, r"unembed\.bias' \(float\)"),
        ({"unembed.bias": torch.zeros(1).expand(10**12)}, r"unembed\.bias' \(Tensor\)"),
        ({"unembed.bias": torch.zeros(2).to_sparse()}, r"unembed\.bias' \(Tensor\)"),
        ({"unembed.bias": torch.zeros(10**12, device="meta")}, r"unembed\.bias' \(Tensor\)"),
    ],
    ids=["list", "no-state", "empty", "number", "repeated", "sparse", "meta"],
)
def test_what_is_no_table_of_tensors_is_refused(
    store: ModelStore, file: Path, config: Path, content: Any, match: str
) -> None:
    torch.save(content, file)
    refused(store, file, match, config=config)


def test_a_trainers_settings_are_not_taken_for_the_architecture(
    store: ModelStore, file: Path, toto: dict[str, torch.Tensor]
) -> None:
    torch.save(trainers(toto), file)
    refused(store, file, r"does not say what it is: .* --config")


def test_wrong_tensors_are_named_as_strictly_as_of_a_folder(
    store: ModelStore, file: Path, config: Path, toto: dict[str, torch.Tensor]
) -> None:
    state = {**toto, "model.stray": torch.zeros(2), "model.patch_embed.projection.weight": torch.zeros(3, 64)}
    del state["model.unembed.bias"]
    torch.save(trainers(state), file)
    refused(
        store,
        file,
        r"missing unembed\.bias \[2048\]; unexpected stray \[2\]; patch_embed\.projection\.weight is \[3, 64\]",
        config=config,
    )


def test_adapters_of_low_rank_are_refused_because_nothing_says_their_factor(
    store: ModelStore, file: Path, config: Path, toto: dict[str, torch.Tensor]
) -> None:
    wrapped = {name.replace("wQKV.", "wQKV.base_layer."): tensor for name, tensor in toto.items()}
    wrapped["model.transformer.layers.0.attention.wQKV.lora_A.weight"] = torch.zeros(8, 32)
    torch.save(trainers(wrapped), file)
    refused(store, file, r"adapters of low rank .* without the factor", config=config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_tensor_of_another_dtype_is_named(
    store: ModelStore, file: Path, config: Path, toto: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    torch.save({**toto, "model.unembed.bias": torch.zeros(2048).to(dtype)}, file)
    refused(store, file, rf"unembed\.bias is {dtype}", config=config)


def test_a_kronos_predictor_alone_says_which_tokenizer_it_lacks(store: ModelStore, file: Path) -> None:
    weights = random_weights("kronos", KRONOS_TINY)
    predictor = {k.partition(".")[2]: v for k, v in weights.items() if k.startswith("predictor")}
    torch.save({"model": predictor, "config": KRONOS_TINY["predictor"]}, file)
    refused(store, file, r"without its tokenizer: put the tokenizer's folder at .*/run/tokenizer")


# -- the command --------------------------------------------------------------------------------


def test_the_command_imports_a_file_under_the_name_that_it_is_given(
    file: Path, config: Path, toto: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(trainers(toto), file)
    words = ["store", "import", "--legacy-pt", str(file), "--config", str(config), "--store", str(tmp_path / "store")]
    assert "needs --name" in CliRunner().invoke(main, words).output
    done = CliRunner().invoke(main, [*words, "--name", "toto-mine"])
    assert done.exit_code == 0, done.output
    assert ModelStore(tmp_path / "store").models() == ["toto-mine"]


@pytest.mark.parametrize("words", [[], ["./folder", "--legacy-pt", __file__], ["./folder", "--config", __file__]])
def test_the_command_refuses_what_does_not_go_together(words: list[str]) -> None:
    done = CliRunner().invoke(main, ["store", "import", *words])
    assert (done.exit_code, "--legacy-pt" in done.output) == (2, True)
