import dataclasses

import numpy as np
import paddle
import pytest

from paddle_dit.data.source import open_source
from paddle_dit.data.subset import spread
from paddle_dit.diffusion.objective import GaussianDiffusion
from paddle_dit.models.dit import DiT
from paddle_dit.training.ranks import Ranks
from paddle_dit.training.validation import Validation


@pytest.fixture
def model(tiny_config):
    """Return a model without the initial zeros, which would hide what it is given."""
    model, random = DiT(tiny_config), np.random.default_rng(0)
    for weight in model.parameters():
        weight.set_value(0.1 * random.standard_normal(weight.shape).astype(np.float32))
    return model


@pytest.fixture
def source(latent_store):
    return spread(open_source(latent_store), 33)


class Recorder:
    """Keeps what a model is given."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, *inputs):
        self.calls.append([value.numpy() for value in inputs])
        return self.model(*inputs)


def validation(source, config, ranks=None, seed=3, batch_size=16):
    return Validation(source, config, GaussianDiffusion(), seed, ranks or Ranks(), batch_size)


def assert_close(found, expected):
    assert found.keys() == expected.keys() == {"loss", "mse", "vb"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


def test_the_figures_are_means_over_every_sample(tiny_config, model, source):
    recorder = Recorder(model)
    found = validation(source, tiny_config).losses(recorder)
    labels = np.concatenate([call[2] for call in recorder.calls])
    timesteps = np.concatenate([call[1] for call in recorder.calls])
    np.testing.assert_array_equal(labels, source.labels)
    np.testing.assert_array_equal(np.sort(timesteps), np.arange(33) * 1000 // 33)
    assert not np.array_equal(timesteps, np.sort(timesteps))
    whole = validation(source, tiny_config, batch_size=33).losses(model)
    assert_close(found, whole)
    assert found["loss"] == pytest.approx(found["mse"] + found["vb"])


def test_the_figures_are_the_same_at_every_call_and_leave_no_trace(tiny_config, model, source):
    held_out = validation(source, tiny_config)
    paddle.seed(5)
    untouched = paddle.randn([4]).numpy()
    paddle.seed(5)
    first = held_out.losses(model)
    np.testing.assert_array_equal(paddle.randn([4]).numpy(), untouched)
    assert held_out.losses(model) == first
    assert validation(source, tiny_config).losses(model) == first
    assert validation(source, tiny_config, seed=4).losses(model) != first
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(("samples", "ranks"), [(33, 2), (33, 3), (17, 16), (1, 2)])
def test_the_ranks_shares_make_up_the_whole(tiny_config, model, latent_store, monkeypatch, samples, ranks):
    source = spread(open_source(latent_store), samples)
    whole = validation(source, tiny_config, batch_size=8).losses(model)
    shares, calls = [], []
    for rank in range(ranks):
        monkeypatch.setattr(Ranks, "any", lambda self, *facts: list(facts))
        monkeypatch.setattr(Ranks, "mean", lambda self, values: shares.append(np.array(values)) or np.ones(4))
        recorder = Recorder(model)
        validation(source, tiny_config, Ranks(rank, ranks), batch_size=8).losses(recorder)
        calls.append(len(recorder.calls))
    assert len(set(calls)) == 1  # collective calls in the model need the company of all
    total = np.sum(shares, axis=0)
    assert total[-1] == samples
    assert_close(dict(zip(("loss", "mse", "vb"), total[:-1] / total[-1], strict=True)), whole)


def test_ranks_that_share_a_model_see_the_same_samples(tiny_config, model, latent_store, monkeypatch):
    source = spread(open_source(latent_store), 34)
    monkeypatch.setattr(Ranks, "any", lambda self, *facts: list(facts))
    monkeypatch.setattr(Ranks, "mean", lambda self, values: np.array(list(values)))
    seen = []
    for rank in range(4):
        recorder = Recorder(model)
        validation(source, tiny_config, Ranks(rank, 4, model_degree=2)).losses(recorder)
        seen.append(np.concatenate([call[0] for call in recorder.calls]))
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[2], seen[3])
    assert len(seen[0]) == 17
    assert not np.isin(seen[0][:, 0, 0, 0], seen[2][:, 0, 0, 0]).any()


def test_an_unconditional_model_is_given_its_null_class(tiny_config, source):
    config = dataclasses.replace(tiny_config, num_classes=0)
    recorder = Recorder(DiT(config))
    validation(source, config).losses(recorder)
    assert all((call[2] == config.null_class).all() for call in recorder.calls)
