"""Published folders, as the reference implementations write them at small sizes, become versions or are refused."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.published import KRONOS, TOTO_BASE, request
from bench.references import KronosReference, TotoReference, build_kronos
from model_store.store import ModelStore, VersionNotFound
from model_store.upstream import ImportRefused, import_checkpoint
from models.candles import DAY_MS, check_candles, with_amount
from models.families import build_forecaster
from models.forecaster import Forecast, ForecastInput, forecast

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the references import warns of xformers and json, and of nothing here
    from model.kronos import Kronos, KronosTokenizer
    from toto.model.toto import Toto

TOTO: dict[str, Any] = {
    "patch_size": 64,
    "stride": 64,
    "embed_dim": 32,
    "num_layers": 4,
    "num_heads": 2,
    "mlp_hidden_dim": 48,
    "dropout": 0.1,
    "spacewise_every_n_layers": 4,
    "spacewise_first": False,
    "scaler_cls": "<class 'model.scaler.CausalPatchStdMeanScaler'>",
    "output_distribution_classes": ["<class 'model.distribution.MixtureOfStudentTsOutput'>"],
    "output_distribution_kwargs": {"k_components": 3},
    "use_memory_efficient_attention": False,
    "stabilize_with_global": True,
    "scale_factor_exponent": 10.0,
}
_NO_DROPOUT = {"ffn_dropout_p": 0.0, "attn_dropout_p": 0.0, "resid_dropout_p": 0.0}
PREDICTOR = {"s1_bits": 4, "s2_bits": 4, "n_layers": 2, "d_model": 32, "n_heads": 2, "ff_dim": 64}
TOKENIZER = {
    "d_in": 6, "d_model": 32, "n_heads": 2, "ff_dim": 64, "n_enc_layers": 3, "n_dec_layers": 3, "s1_bits": 4,
    "s2_bits": 4, "beta": 0.05, "gamma0": 1.0, "gamma": 1.1, "zeta": 0.05, "group_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def reference_toto() -> Toto:
    torch.manual_seed(1)
    return Toto(**TOTO).eval()


@pytest.fixture
def toto_folder(tmp_path: Path, reference_toto: Toto) -> Path:
    """Laid out as the published checkpoint is: the wrapper's prefix, the rotary frequencies."""
    folder = tmp_path / "Toto-Tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TOTO))
    extra = {"model.transformer.rotary_emb.freqs": torch.ones(8)}
    save_file({**reference_toto.state_dict(), **extra}, folder / "model.safetensors")
    return folder


def write_kronos(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hub's mixin, not this project
        Kronos(**PREDICTOR, **_NO_DROPOUT, token_dropout_p=0.0, learn_te=True).save_pretrained(folder)
        KronosTokenizer(**{**TOKENIZER, **changes}, **_NO_DROPOUT).save_pretrained(tokenizer)
    return folder


@pytest.fixture
def kronos_folder(tmp_path: Path) -> Path:
    return write_kronos(tmp_path / "Kronos-Tiny", tmp_path / "Kronos-Tiny" / "tokenizer")


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "artifacts")


def edit(folder: Path, **changes: Any) -> None:
    """Add, replace or (None) remove tensors of a checkpoint."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def answer(store: ModelStore, reference: str, horizon: int = 10) -> Forecast:
    loaded = store.load(reference)
    model = build_forecaster(loaded.manifest.family, loaded.config, loaded.weights)
    rng = np.random.default_rng(0)
    closes = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, 130)))
    candles = np.column_stack([closes, closes * 1.01, closes * 0.99, closes, rng.uniform(1e5, 2e5, 130)])
    times = 1_700_006_400_000 + DAY_MS * np.arange(130 + horizon)
    return forecast(model, [ForecastInput(times[:130], with_amount(candles), times[130:], times)])[0]


def refused(store: ModelStore, folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(ImportRefused, match=match):
        import_checkpoint(store, folder, "imported", **options)
    assert store.models() == [], "something was stored"


# -- what is imported ---------------------------------------------------------------------------


def test_a_toto_folder_becomes_a_version_that_forecasts(store: ModelStore, toto_folder: Path) -> None:
    manifest = import_checkpoint(store, toto_folder, "toto-tiny", licence="Apache-2.0")
    assert (manifest.family, manifest.model) == ("toto", "toto-tiny")
    assert manifest.origin.model_dump() == {
        "kind": "imported", "source": "Toto-Tiny", "revision": None, "licence": "Apache-2.0",
        "tokenizer": None, "tokenizer_revision": None,
    }  # fmt: skip
    assert manifest.limits.max_context == 4096
    result = answer(store, f"toto-tiny@{manifest.version}")
    check_candles(result.point)


def test_a_toto_keeps_every_tensor_under_its_name_without_the_wrapper(
    store: ModelStore, toto_folder: Path, reference_toto: Toto
) -> None:
    version = import_checkpoint(store, toto_folder, "toto-tiny").version
    loaded = store.load(f"toto-tiny@{version}")
    expected = {k.removeprefix("model."): v for k, v in reference_toto.state_dict().items()}
    assert loaded.weights.keys() == expected.keys()
    assert all(torch.equal(loaded.weights[name], expected[name]) for name in expected)
    assert loaded.config == {"network": TOTO, "max_context": 4096}


def test_a_toto_saved_with_fused_feed_forward_is_the_same_version(store: ModelStore, toto_folder: Path) -> None:
    plain = import_checkpoint(store, toto_folder, "toto-tiny")
    fused = {
        name.replace("mlp.0.", "mlp.0.w12.").replace("mlp.2.", "mlp.0.w3."): tensor
        for name, tensor in load_file(toto_folder / "model.safetensors").items()
    }
    assert any("w12" in name for name in fused)
    save_file(fused, toto_folder / "model.safetensors")
    assert import_checkpoint(store, toto_folder, "toto-tiny") == plain


def test_a_kronos_folder_becomes_a_version_that_forecasts(store: ModelStore, kronos_folder: Path) -> None:
    manifest = import_checkpoint(store, kronos_folder, "kronos-tiny", licence="MIT")
    assert manifest.family == "kronos"
    assert manifest.limits.max_total == 512
    result = answer(store, f"kronos-tiny@{manifest.version}")
    check_candles(result.point)


def test_a_kronos_keeps_every_learned_tensor_of_both_parts(store: ModelStore, kronos_folder: Path) -> None:
    loaded = store.load(f"k@{import_checkpoint(store, kronos_folder, 'k').version}")
    for part, folder in (("predictor", kronos_folder), ("tokenizer", kronos_folder / "tokenizer")):
        published = load_file(folder / "model.safetensors")
        learned = {k for k in published if not k.endswith("inv_freq") and "bsq" not in k}
        assert {k.removeprefix(f"{part}.") for k in loaded.weights if k.startswith(part)} == learned
        assert all(torch.equal(loaded.weights[f"{part}.{name}"], published[name]) for name in learned)
    assert set(loaded.config) == {"predictor", "tokenizer", "context"}


def test_a_tokenizer_may_lie_elsewhere(store: ModelStore, tmp_path: Path, kronos_folder: Path) -> None:
    inside = import_checkpoint(store, kronos_folder, "k")
    elsewhere = shutil.move(kronos_folder / "tokenizer", tmp_path / "Kronos-Tokenizer-base")
    assert import_checkpoint(store, kronos_folder, "k", tokenizer=elsewhere) == inside


def test_the_2k_tokenizer_means_a_context_of_2048(store: ModelStore, tmp_path: Path) -> None:
    folder = write_kronos(tmp_path / "mini", tmp_path / "mini" / "tokenizer", s1_bits=5, s2_bits=5, group_size=5)
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide = {**PREDICTOR, "s1_bits": 5, "s2_bits": 5}
        Kronos(**wide, **_NO_DROPOUT, token_dropout_p=0.0, learn_te=True).save_pretrained(folder)
    assert import_checkpoint(store, folder, "mini").limits.max_total == 2048


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_stored_as_it_came_and_forecasts_as_the_same_numbers_in_float32(
    store: ModelStore, toto_folder: Path, dtype: torch.dtype
) -> None:
    halves = {name: tensor.to(dtype) for name, tensor in load_file(toto_folder / "model.safetensors").items()}
    save_file(halves, toto_folder / "model.safetensors")
    half = import_checkpoint(store, toto_folder, "half")
    save_file({name: tensor.float() for name, tensor in halves.items()}, toto_folder / "model.safetensors")
    whole = import_checkpoint(store, toto_folder, "whole")
    weights = store.load(f"half@{half.version}").weights
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert half.files["weights.safetensors"].bytes < 0.51 * whole.files["weights.safetensors"].bytes
    points = [answer(store, f"{m.model}@{m.version}").point for m in (half, whole)]
    np.testing.assert_array_equal(*points)


@pytest.mark.parametrize(
    "size", ["mini", pytest.param("small", marks=pytest.mark.long), pytest.param("base", marks=pytest.mark.long)]
)
def test_a_kronos_of_the_published_size_forecasts_as_the_reference_that_wrote_it(
    store: ModelStore, tmp_path: Path, size: str
) -> None:
    config = KRONOS[size]
    networks = build_kronos(config)
    for network, folder in zip(networks, (tmp_path / "Kronos" / "tokenizer", tmp_path / "Kronos"), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hub's mixin, not this project
            network.save_pretrained(folder)
    manifest = import_checkpoint(store, tmp_path / "Kronos", "kronos")
    loaded = store.load(f"kronos@{manifest.version}")
    item = request(64, 4, seed=5, samples=1, top_k=1)
    theirs = KronosReference(config).forecast(item)
    ours = forecast(build_forecaster("kronos", loaded.config, loaded.weights), [item])[0].point
    np.testing.assert_allclose(ours[:, 3:], theirs[:, 3:5], rtol=1e-5)  # a repair may move high and low


@pytest.mark.long
def test_the_toto_of_the_published_size_forecasts_as_the_reference_that_wrote_it(
    store: ModelStore, tmp_path: Path
) -> None:
    reference = TotoReference(TOTO_BASE)
    (tmp_path / "Toto").mkdir()
    (tmp_path / "Toto" / "config.json").write_text(json.dumps(TOTO_BASE))
    extra = {"transformer.rotary_emb.freqs": torch.ones(32)}
    published = {f"model.{name}": tensor for name, tensor in {**reference.weights, **extra}.items()}
    save_file(published, tmp_path / "Toto" / "model.safetensors")
    manifest = import_checkpoint(store, tmp_path / "Toto", "toto")
    loaded = store.load(f"toto@{manifest.version}")
    assert sum(tensor.numel() for tensor in loaded.weights.values()) == 151_306_080
    item = request(512, 64, seed=6, aggregate="mean")
    ours = forecast(build_forecaster("toto", loaded.config, loaded.weights), [item])[0].point
    np.testing.assert_allclose(ours[:, 3:], reference.forecast(item, None)[3:].T, rtol=1e-5)


def test_importing_twice_is_importing_once(store: ModelStore, toto_folder: Path) -> None:
    first, second = (import_checkpoint(store, toto_folder, "toto-tiny") for _ in range(2))
    assert first == second
    assert store.versions("toto-tiny") == [first.version]


def test_an_import_is_not_servable_until_it_is_promoted(store: ModelStore, toto_folder: Path) -> None:
    import_checkpoint(store, toto_folder, "toto-tiny")
    with pytest.raises(VersionNotFound):
        store.resolve("toto-tiny")
    store.promote("toto-tiny")
    assert store.load("toto-tiny").manifest.family == "toto"


def test_a_folder_of_the_hub_cache_tells_its_id_and_revision(
    store: ModelStore, tmp_path: Path, toto_folder: Path
) -> None:
    snapshot = tmp_path / "hub" / "models--Datadog--Toto-Open-Base-1.0" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    for file in toto_folder.iterdir():
        (snapshot / file.name).symlink_to(file)  # as the cache does
    origin = import_checkpoint(store, snapshot, "toto-base").origin
    assert (origin.source, origin.revision) == ("Datadog/Toto-Open-Base-1.0", "ab" * 20)


def test_the_licence_is_the_model_cards(store: ModelStore, toto_folder: Path) -> None:
    (toto_folder / "README.md").write_text("---\ntags:\n- time-series\nlicense: apache-2.0\n---\n# Toto\n")
    assert import_checkpoint(store, toto_folder, "toto-tiny").origin.licence == "apache-2.0"


def test_a_licence_mentioned_below_the_front_matter_is_not_taken(store: ModelStore, toto_folder: Path) -> None:
    (toto_folder / "README.md").write_text("---\ntags:\n- x\n---\nlicense: mit\n")
    assert import_checkpoint(store, toto_folder, "toto-tiny").origin.licence is None


def test_no_path_of_this_machine_reaches_the_manifest(store: ModelStore, toto_folder: Path) -> None:
    manifest = import_checkpoint(store, toto_folder, "toto-tiny")
    assert str(toto_folder.parent) not in manifest.model_dump_json()


# -- what is refused ----------------------------------------------------------------------------


def test_a_missing_tensor_is_named(store: ModelStore, toto_folder: Path) -> None:
    edit(toto_folder, **{"model.transformer.layers.2.attention.wO.bias": None})
    refused(store, toto_folder, r"missing transformer\.layers\.2\.attention\.wO\.bias \[32\]")


def test_an_extra_tensor_is_named(store: ModelStore, toto_folder: Path) -> None:
    edit(toto_folder, **{"model.fusion.weight": torch.zeros(2)})
    refused(store, toto_folder, r"unexpected fusion\.weight \[2\]")


def test_a_misshapen_tensor_is_named_with_both_shapes(store: ModelStore, toto_folder: Path) -> None:
    edit(toto_folder, **{"model.unembed.bias": torch.zeros(7)})
    refused(store, toto_folder, r"unembed\.bias is \[7\], the config needs \[2048\]")


def test_a_tensor_with_nan_is_named(store: ModelStore, toto_folder: Path) -> None:
    edit(toto_folder, **{"model.unembed.bias": torch.full((2048,), torch.nan)})
    refused(store, toto_folder, r"unembed\.bias holds NaN")


@pytest.mark.parametrize("part", ["predictor", "tokenizer"])
def test_kronos_is_as_strict_in_both_parts(store: ModelStore, kronos_folder: Path, part: str) -> None:
    folder = kronos_folder if part == "predictor" else kronos_folder / "tokenizer"
    edit(folder, **{"head.bias": None, "norm.weight": None, "stray.weight": torch.zeros(1)})
    gone = r"norm\.weight" if part == "predictor" else r"head\.bias"
    refused(store, kronos_folder, rf"missing {part}\.{gone}.*unexpected {part}\.stray\.weight")


def test_two_names_for_one_tensor_are_refused(store: ModelStore, toto_folder: Path) -> None:
    edit(toto_folder, **{"unembed.bias": torch.zeros(2048)})
    refused(store, toto_folder, r"two tensors are called unembed\.bias")


def test_a_config_with_an_unknown_key_is_refused(store: ModelStore, toto_folder: Path) -> None:
    edit_config(toto_folder, rope_theta=1e6)
    refused(store, toto_folder, "rope_theta")


def test_a_config_without_a_needed_key_is_refused(store: ModelStore, toto_folder: Path) -> None:
    edit_config(toto_folder, scaler_cls=None)
    refused(store, toto_folder, "scaler_cls")


def test_a_config_of_another_size_than_the_weights_is_refused(store: ModelStore, toto_folder: Path) -> None:
    edit_config(toto_folder, num_layers=5)
    refused(store, toto_folder, r"missing transformer\.layers\.4")


def test_a_kronos_without_its_tokenizer_says_which_one_to_fetch(store: ModelStore, kronos_folder: Path) -> None:
    shutil.rmtree(kronos_folder / "tokenizer")
    refused(store, kronos_folder, r"without its tokenizer.*Kronos-Tokenizer-2k for mini")


def test_a_tokenizer_with_other_bits_is_refused(store: ModelStore, tmp_path: Path) -> None:
    folder = write_kronos(tmp_path / "k", tmp_path / "k" / "tokenizer", s1_bits=2, s2_bits=6)
    refused(store, folder, r"s1_bits 2, the predictor 4")


def test_a_tokenizer_of_an_unknown_group_size_is_refused(store: ModelStore, kronos_folder: Path) -> None:
    edit_config(kronos_folder / "tokenizer", group_size=2)
    refused(store, kronos_folder, "group_size 2")


def test_a_tokenizer_of_another_group_size_than_the_predictors_size_was_trained_with_is_refused(
    store: ModelStore, tmp_path: Path
) -> None:
    folder = write_kronos(tmp_path / "mini", tmp_path / "mini" / "tokenizer", group_size=4)
    edit_config(folder, n_layers=4, d_model=256)
    refused(store, folder, r"group_size 4: .* trained with NeoQuasar/Kronos-Tokenizer-2k")


def test_adapters_of_low_rank_in_a_folder_are_refused(store: ModelStore, kronos_folder: Path) -> None:
    edit(kronos_folder, **{"transformer.0.ffn.w1.lora_A.weight": torch.zeros(2, 32)})
    refused(store, kronos_folder, r"adapters of low rank .* without the factor")


def test_a_checkpoint_in_parts_is_refused(store: ModelStore, toto_folder: Path) -> None:
    (toto_folder / "model.safetensors").rename(toto_folder / "model-00001-of-00001.safetensors")
    (toto_folder / "model.safetensors.index.json").write_text("{}")
    refused(store, toto_folder, r"no model\.safetensors, but parts of one")


def test_a_tokenizer_alone_is_refused(store: ModelStore, kronos_folder: Path) -> None:
    refused(store, kronos_folder / "tokenizer", "tokenizer alone")


def test_a_toto_with_a_tokenizer_is_refused(store: ModelStore, toto_folder: Path, kronos_folder: Path) -> None:
    refused(store, toto_folder, "has no tokenizer", tokenizer=kronos_folder / "tokenizer")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "best.pt", "model.ckpt"])
def test_a_folder_with_a_pickle_only_is_refused_with_the_way_out(
    store: ModelStore, toto_folder: Path, name: str
) -> None:
    (toto_folder / "model.safetensors").rename(toto_folder / name)
    refused(store, toto_folder, rf"{name} may run code when read.*--legacy-pt.*safetensors\.torch\.save_file")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(store: ModelStore, toto_folder: Path, data: bytes) -> None:
    (toto_folder / "model.safetensors").write_bytes(data)
    refused(store, toto_folder, "is not a safetensors file")


def test_a_truncated_checkpoint_is_refused(store: ModelStore, toto_folder: Path) -> None:
    path = toto_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(store, toto_folder, "is not a safetensors file")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_config_of_something_else_is_refused(store: ModelStore, toto_folder: Path, text: str) -> None:
    (toto_folder / "config.json").write_text(text)
    refused(store, toto_folder, r"Toto-Tiny")


def test_an_empty_or_absent_folder_is_refused(store: ModelStore, tmp_path: Path) -> None:
    refused(store, tmp_path, r"has no config\.json")
    refused(store, tmp_path / "nowhere", r"has no config\.json")


def test_a_name_that_no_model_may_have_is_refused_before_anything_is_stored(
    store: ModelStore, toto_folder: Path
) -> None:
    with pytest.raises(VersionNotFound, match="is not a model name"):
        import_checkpoint(store, toto_folder, "../toto")
