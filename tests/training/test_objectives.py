"""Objectives and initialisations, on the real sample candles."""

import copy
from datetime import date

import numpy as np
import pytest
import torch

from bench.published import KRONOS_TINY, TOTO_TINY
from models.forecaster import forecast
from models.kronos.network import KronosPredictor, PredictorConfig
from models.kronos.tokenizer import KronosTokenizer, TokenizerConfig
from models.toto.forecaster import TotoForecaster
from models.toto.network import TotoConfig, TotoNetwork
from models.toto.transform import LogScales
from training.evaluate import evaluate, summary
from training.initial import start_at_random_walk, start_with_bits
from training.loop import fit
from training.objectives import NextPatch, NextToken, TokenizerReconstruction, normalised_windows
from training.recipe import Phase
from training.resume import Place, read_state
from training.windows import WindowSampler, forecast_input, rolling_origins, series_calendar, split_by_dates

TOTO = TOTO_TINY | {"patch_size": 16, "stride": 16, "num_layers": 2, "mlp_hidden_dim": 32}
TOKENIZER = KRONOS_TINY["tokenizer"]
PREDICTOR = KRONOS_TINY["predictor"] | {"n_layers": 1}
LOG = (100.0, 10.0)


def total_loss(objective, batch):
    return sum(float(part.detach()) for part in objective.loss(batch).values())


@pytest.fixture
def split():
    return split_by_dates(date(2009, 1, 1), date(2010, 6, 1), horizon=16, unseen=["IBM"])


@pytest.fixture
def toto():
    torch.manual_seed(0)
    network = TotoNetwork(TotoConfig.from_published(TOTO))
    start_at_random_walk(network)
    return network


def test_start_is_the_naive_forecast_with_a_spread_that_grows(toto, samples):
    item = next(item for item in samples if item.symbol == "AAPL")
    request = forecast_input(item, 3000, horizon=16, lookback=128, calendar=series_calendar(item))
    result = forecast(TotoForecaster(toto, max_context=128, log_scales=LOG), [request])[0]
    np.testing.assert_allclose(result.quantiles["close"][1], request.last_close, rtol=1e-6)
    spread = np.diff(np.log(result.quantiles["close"])[[0, 2]], axis=0)[0]
    assert 1.6 < spread[8:].mean() / spread[:4].mean() < 3.2  # 2.29 for roots of the step, and the noise of the rest


def test_start_sees_the_changes_inside_a_patch_and_no_level(toto):
    patches = torch.randn(5, 16).cumsum(-1)
    here, there = toto.patch_embed(patches), toto.patch_embed(patches + 7)
    torch.testing.assert_close(there[:, 0] - here[:, 0], torch.full((5,), 7.0))
    torch.testing.assert_close(there[:, 1:], here[:, 1:], rtol=0, atol=1e-3)


def test_training_moves_the_spread_but_never_the_location(toto, samples, split):
    sampler = WindowSampler(samples, split, 128 + 16)
    objective = NextPatch(toto, {1: sampler}, LogScales(*LOG), 128, np.random.default_rng(0), steps_drawn=8)
    phase = Phase(steps=60, max_seconds=60, learning_rate=3e-3)
    origins = rolling_origins(samples, split, "test", stride=40, min_context=128)
    before = summary(evaluate(TotoForecaster(toto, max_context=128, log_scales=LOG), samples, origins, lookback=128))
    fit(objective, phase, lambda done, note: None)
    after = summary(evaluate(TotoForecaster(toto, max_context=128, log_scales=LOG), samples, origins, lookback=128))
    assert after.metrics["crps"].value < before.metrics["crps"].value
    assert abs(after.metrics["skill_vs_naive"].value) < 1e-3


def test_loss_is_the_likelihood_of_a_slow_loop(toto, samples, split):
    sampler = WindowSampler(samples, split, 64 + 16)
    transform = LogScales(*LOG)
    objective = NextPatch(toto, {1: sampler}, transform, 64, np.random.default_rng(0), steps_drawn=16)
    candles = sampler.draw(2, np.random.default_rng(5)).candles
    values = torch.from_numpy(transform.encode(candles, 64).astype(np.float32)).transpose(1, 2)
    ours = total_loss(objective, (values, torch.arange(16).expand(2, -1)))
    loc, scale = toto.scale(values[..., :64])
    hidden = toto.embed(values[..., :64], loc, scale)
    weights, total = (1, 1, 1, 2.0, 0.2), 0.0
    head, bias = toto.output_distribution.stacked()
    for variate, weight in enumerate(weights):
        losses = []
        for row in range(2):
            for patch in range(4):
                states = toto.unembed(hidden[row, variate, patch]).view(16, 32)
                mixture = toto.mixture(states @ head.T + bias)
                parts = torch.distributions.StudentT(mixture.df, mixture.loc, mixture.scale)
                target = values[row, variate, 16 * (patch + 1) : 16 * (patch + 2)]
                scaled = (target - loc[row, variate, patch]) / scale[row, variate, patch]
                likelihood = torch.logsumexp(mixture.log_weights + parts.log_prob(scaled[:, None]), dim=-1)
                losses.append(-likelihood.mean())
        total += weight * float(torch.stack(losses).mean().detach())
    assert ours == pytest.approx(total / sum(weights), rel=1e-4)


def test_window_statistics_never_see_the_targets(samples, split):
    candles = WindowSampler(samples, split, 80).draw(3, np.random.default_rng(0)).candles
    changed = candles.copy()
    changed[:, 64:] *= 2
    np.testing.assert_array_equal(normalised_windows(changed, 64)[:, :64], normalised_windows(candles, 64)[:, :64])


def test_tokenizer_and_predictor_learn(samples, split):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sampler = WindowSampler(samples, split, 80)
    tokenizer = KronosTokenizer(TokenizerConfig.from_published(TOKENIZER))
    reconstruction = TokenizerReconstruction(tokenizer, sampler, 64, rng)
    start = total_loss(reconstruction, reconstruction.draw(64))
    run = fit(reconstruction, Phase(steps=60, max_seconds=60, learning_rate=1e-2), lambda done, note: None)
    assert run.loss < 0.6 * start
    predictor = KronosPredictor(PredictorConfig.from_published(PREDICTOR))
    start_with_bits(predictor)
    frozen = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    objective = NextToken(predictor, tokenizer, sampler, 64, rng)
    start = total_loss(objective, objective.draw(64))
    run = fit(objective, Phase(steps=60, max_seconds=60, learning_rate=1e-2), lambda done, note: None)
    assert run.loss < 0.9 * start
    assert all(torch.equal(frozen[name], tensor) for name, tensor in tokenizer.state_dict().items())


@torch.inference_mode()
def test_tokens_start_at_a_random_walk():
    torch.manual_seed(0)
    predictor = KronosPredictor(PredictorConfig.from_published(PREDICTOR))
    start_with_bits(predictor)
    now = torch.randint(0, 16, (2, 4, 24))
    stamps = torch.randint(1, 7, (4, 24, 5))
    following = torch.randint(0, 16, (4, 24))
    for token, logits in zip(now, predictor(*now, stamps, following), strict=True):
        assert (logits.argmax(-1) == token).float().mean() > 0.95


@torch.inference_mode()
def test_a_bar_teaches_as_much_as_its_mirror_image(samples, split):
    torch.manual_seed(0)
    alone = TokenizerConfig.from_published(TOKENIZER | {"n_enc_layers": 1})  # no token knows those before it
    predictor = KronosPredictor(PredictorConfig.from_published(PREDICTOR))
    sampler = WindowSampler(samples, split, 80)
    tokenizer = KronosTokenizer(alone)
    objective = NextToken(
        predictor, tokenizer, sampler, 64, np.random.default_rng(0), lookback_weight=0.0, mirrored=True
    )
    candles, stamps, images = objective.draw(8)
    other, image = candles.clone(), images.clone()
    other[:, -1], image[:, -1] = images[:, -1], candles[:, -1]
    loss = total_loss(objective, (candles, stamps, images))
    assert total_loss(objective, (other, stamps, image)) == pytest.approx(loss, rel=1e-6)
    assert total_loss(objective, (candles, stamps, candles)) != pytest.approx(loss, rel=1e-6)
    assert total_loss(objective, (candles, stamps)) == pytest.approx(
        total_loss(objective, (candles, stamps, candles)), rel=1e-6
    )


@torch.inference_mode()
def test_errors_of_a_variate_count_by_its_weight(samples, split):
    torch.manual_seed(0)
    tokenizer = KronosTokenizer(TokenizerConfig.from_published(TOKENIZER))
    sampler = WindowSampler(samples, split, 80)
    blind = TokenizerReconstruction(tokenizer, sampler, 64, np.random.default_rng(0), weights=(1, 1, 1, 1, 0, 0))
    even = TokenizerReconstruction(tokenizer, sampler, 64, np.random.default_rng(0))
    (candles,) = even.draw(8)
    errors = (tokenizer(candles)[1] - candles).square().mean((0, 1))
    assert float(even.loss((candles,))["mse_all"]) == pytest.approx(float(errors.mean()), rel=1e-5)
    assert float(blind.loss((candles,))["mse_all"]) == pytest.approx(float(errors[:4].mean()), rel=1e-5)


def test_losses_stay_on_the_device_of_the_network(samples, split, toto):
    """On the meta device every tensor that is made elsewhere fails, as it would on a GPU."""
    tokenizer = KronosTokenizer(TokenizerConfig.from_published(TOKENIZER))
    predictor = KronosPredictor(PredictorConfig.from_published(PREDICTOR))
    sampler, rng = WindowSampler(samples, split, 144), np.random.default_rng(0)
    for objective in (
        NextPatch(toto.to("meta"), {1: sampler}, LogScales(*LOG), 128, rng),
        TokenizerReconstruction(tokenizer.to("meta"), sampler, 64, rng),
        NextToken(predictor.to("meta"), tokenizer, sampler, 64, rng, mirrored=True),
    ):
        parts = objective.loss(tuple(tensor.to("meta") for tensor in objective.draw(4)))
        total = torch.stack(list(parts.values())).sum()
        total.backward()
        assert total.is_meta


def test_targets_inside_the_lookback_count_little(samples, split):
    torch.manual_seed(0)
    tokenizer = KronosTokenizer(TokenizerConfig.from_published(TOKENIZER))
    predictor = KronosPredictor(PredictorConfig.from_published(PREDICTOR))
    sampler = WindowSampler(samples, split, 80)
    objectives = [
        NextToken(predictor, tokenizer, sampler, 64, np.random.default_rng(0), lookback_weight=weight)
        for weight in (0.0, 0.05, 1.0)
    ]
    assert len({round(total_loss(objective, objective.draw(8)), 6) for objective in objectives}) == 3


@torch.inference_mode()
def test_teacher_forced_logits_are_those_that_decoding_samples_from():
    """Trained as served: position t of the training forward equals one cached step after t tokens."""
    from models.kronos.decoder import KronosDecoder, Tokens

    torch.manual_seed(0)
    tokenizer = KronosTokenizer(TokenizerConfig.from_published(TOKENIZER))
    predictor = KronosPredictor(PredictorConfig.from_published(PREDICTOR)).eval()
    coarse, fine = torch.randint(0, 16, (2, 2, 64))
    stamps = torch.ones(2, 64, 5, dtype=torch.int64)
    teacher, _ = predictor(coarse, fine, stamps, coarse)
    decoder = KronosDecoder(tokenizer, predictor).eval()
    prefix = decoder.prefill(Tokens(coarse, fine), stamps, torch.zeros(2, dtype=torch.int64))
    teacher = teacher[:, -1, decoder.coarse_order]  # what is served rises with the decoded close
    np.testing.assert_allclose(decoder.coarse_head(prefix.hidden), teacher, atol=1e-5)


def gradients(objective, **fields):
    fit(objective, Phase(steps=1, learning_rate=1e-9, batch_rows=8, clip=1e9, **fields), lambda *_: None)
    return torch.cat([p.grad.flatten() for p in objective.parameters()])


@pytest.fixture(params=["toto", "kronos"])
def make_objective(request, toto, samples, split):
    sampler = WindowSampler(samples, split, 80)

    def make():
        torch.manual_seed(0)
        if request.param == "toto":
            return NextPatch(copy.deepcopy(toto), {1: sampler}, LogScales(*LOG), 64, np.random.default_rng(0))
        tokenizer = KronosTokenizer(TokenizerConfig.from_published(TOKENIZER))
        predictor = KronosPredictor(PredictorConfig.from_published(PREDICTOR))
        return NextToken(predictor, tokenizer, sampler, 64, np.random.default_rng(0))

    return make


def test_pieces_add_up_to_the_gradients_of_the_whole_batch(make_objective):
    whole = gradients(make_objective())
    torch.testing.assert_close(gradients(make_objective(), accumulate=4), whole, rtol=1e-4, atol=1e-6)


def test_gradients_in_bfloat16_point_where_those_in_float32_do(make_objective):
    exact, rounded = (gradients(make_objective(), precision=name) for name in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layers_that_run_again_give_the_same_gradients(make_objective, precision):
    plain, again = (gradients(make_objective(), precision=precision, checkpoint=on) for on in (False, True))
    assert torch.equal(plain, again)


def test_layers_that_run_again_keep_less(make_objective):
    """Bytes of all tensors that the backward pass is left with, each once."""
    kept = []
    for checkpoint in (False, True):
        objective = make_objective()
        batch, loss, held = objective.draw(8), objective.loss, {}

        def keep(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        def watched(_, loss=loss, batch=batch, keep=keep):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return loss(batch)

        objective.loss = watched
        gradients(objective, checkpoint=checkpoint)
        kept.append(sum(storage.nbytes() for storage in held.values()))
    assert kept[1] < 0.7 * kept[0]


def test_nothing_of_a_run_whose_layers_run_again_stays_with_the_network(make_objective):
    objective = make_objective()
    gradients(objective, checkpoint=True)
    assert not [module for module in objective.network.modules() if "forward" in vars(module)]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's, on its own use of torch
def test_a_compiled_loss_has_the_gradients_of_an_eager_one_and_is_compiled_once(make_objective, tmp_path):
    eager = gradients(make_objective(), checkpoint=True)
    compiled, names = make_objective(), list(make_objective().network.state_dict())
    torch.testing.assert_close(gradients(compiled, compile=True, checkpoint=True), eager, rtol=1e-4, atol=1e-6)
    assert list(compiled.network.state_dict()) == names
    place, graphs = Place(tmp_path, "network"), []
    phase = Phase(steps=3, learning_rate=1e-3, batch_rows=8, save_every=2, compile=True, checkpoint=True)
    stats = torch._dynamo.utils.counters["stats"]
    fit(compiled, phase, lambda *_: graphs.append(stats["unique_graphs"]), place)
    assert graphs[0] > 0
    assert len(set(graphs)) == 1
    tensors, _ = read_state(place.state)
    assert {f"weights/{name}" for name in names} == {name for name in tensors if name.startswith("weights/")}
    resumed = make_objective()
    assert fit(resumed, phase.model_copy(update={"compile": False}), lambda *_: None, place).steps == 3
    for name, tensor in compiled.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], tensor)
