"""Posteriors on targets whose law is known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import priors
from lab import posteriors, train
from lab.populations import Reference, directions, gaussian_like
from lab.settings import PromptSettings, Settings


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def standard(D):
    return posteriors.Gaussian(torch.zeros(D), torch.eye(D), torch.ones(D))


def correlated(D, seed=0):
    """A Gaussian with deviations from 3 to 0.02 in random axes."""
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator(seed), dtype=torch.float64))[0]
    scale = torch.logspace(math.log10(3), math.log10(0.02), D, dtype=torch.float64)
    return posteriors.Gaussian(torch.randn(D, generator=generator(seed)).double(), basis, scale)


def log_prob(gaussian, rows):
    z = (rows.double() - gaussian.mean) @ gaussian.basis / gaussian.scale
    return -0.5 * z.square().sum()


def fit(posterior, log_density, weight, steps, rate):
    """log_density: of a member's rows at layer 0 (n, D), up to a constant."""
    optimiser = posterior.optimiser(rate)
    for group in optimiser.param_groups:
        group["peak"] = group["lr"]
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * train.schedule(step, steps, 1)
        for layers in posterior.members(step):
            (-weight * log_density(layers[0])).backward()
        if posterior.extra_loss() is not None:
            posterior.extra_loss().backward()
        optimiser.step()
        optimiser.zero_grad()


# --------------------------------------------------------------------------------------------------
# rows in a subspace


def reference(W=12):
    return Reference([torch.randn(300, W, generator=generator()) * torch.arange(1, W + 1)], "x")


@pytest.mark.parametrize("kind", ["principal", "random"])
def test_rows_stay_in_their_subspace(kind):
    """Whatever the gradient is; a row's first step is as long as one that may go anywhere."""
    prompt = PromptSettings(subspace=3, directions=kind)
    basis = directions(prompt, {4: reference()}, seed=7)[4]
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    if kind == "principal":  # where the variances are 144, 121 and 100
        assert float(basis[-3:].square().sum()) > 2.9
    start = torch.randn(1, 5, 12, generator=generator(1))
    free, lengths = posteriors.Point({4: start}, {4: 2.0}, 1, 0), []
    confined = posteriors.Confined({4: start}, {4: 2.0}, 1, 0, {4: basis})
    assert torch.equal(confined.representative()[4], start[0])
    target = torch.randn(5, 12, generator=generator(2))
    for p in (free, confined):
        optimiser = p.optimiser()
        for step in range(150):
            (p.members(step)[0][4] - target).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
            if step == 0:
                lengths.append((p.representative()[4] - start[0]).norm(dim=1))
        assert confined.groups()[0]["lr"] == free.groups()[0]["lr"] == 0.1
    torch.testing.assert_close(*lengths, rtol=1e-3, atol=0)
    moved = (confined.representative()[4] - start[0]).double()
    torch.testing.assert_close(moved @ basis @ basis.T, moved, rtol=1e-4, atol=1e-4)
    wanted = (target - start[0]).double() @ basis @ basis.T  # the nearest point of the subspace
    torch.testing.assert_close(moved, wanted, rtol=0, atol=0.3)


def test_frozen_rows_stay_and_the_others_are_trained_as_without_them():
    start = {0: torch.randn(1, 5, 3, generator=generator()),
             4: torch.randn(1, 5, 2, 2, 2, generator=generator(1))}
    frozen = posteriors.PartlyFrozen(start, {0: 2.0, 4: 1.0}, 1, 0, 2)
    free = posteriors.Point(start, {0: 2.0, 4: 1.0}, 1, 0)
    for p in (frozen, free):
        optimiser = p.optimiser()
        for _ in range(4):
            optimiser.zero_grad()
            sum(rows.pow(4).sum() for rows in p.members(0)[0].values()).backward()
            optimiser.step()
    ends = frozen.representative(), free.representative()
    for i, draws in start.items():
        assert torch.equal(ends[0][i][:2], draws[0, :2])
        assert torch.equal(ends[0][i][2:], ends[1][i][2:])
        assert not (ends[0][i][2:] == draws[0, 2:]).any()


# --------------------------------------------------------------------------------------------------
# Langevin chains


def two_modes(x, share, distance):
    """The gradient of minus the log density of share N(distance, 1) + (1 - share) N(-distance, 1),
    and the modes that x belongs to."""
    upper = torch.sigmoid(2 * distance * x + math.log(share / (1 - share)))
    return x - distance * (2 * upper - 1), x > 0


@pytest.mark.parametrize("n, D, K", [(20, 192, 4), (20, 192, 16), (160, 256, 4)])
def test_chains_are_samples_at_the_size_of_a_prompt(n, D, K):
    """P = n D of 3840 and 40960: in every row one direction of two modes, half of the others as the
    prior has them, and half correlated, with precisions of 1 to 100 in random axes. Twenty per cent
    of a variance, and 0.15 of a mode's share."""
    half, share = D // 2, 0.7
    axes = torch.linalg.qr(torch.randn(half, half, generator=generator(1)))[0]
    precision = torch.logspace(0, 2, half)
    sqrt_precision = axes * precision @ axes.T
    p = posteriors.Langevin({0: torch.randn(K, n, D, generator=generator(2))}, {0: standard(D)},
                            1 / 50, seed=3)
    z, optimiser = p.layers["0"], p.optimiser(0.7)
    for step in range(450):
        optimiser.param_groups[0]["lr"] = 0.7 * train.schedule(step, 450, 10)
        x = z.detach()
        gradient = x.clone()
        gradient[..., :1], _ = two_modes(x[..., :1], share, 3.0)
        gradient[..., -half:] = x[..., -half:] @ sqrt_precision
        z.grad = gradient / 50  # the objective is a mean over 50 tokens
        optimiser.step()
    x = z.detach()
    _, upper = two_modes(x[..., 0], share, 3.0)
    assert float(upper.float().mean()) == pytest.approx(share, abs=0.15)
    assert float((x[..., 0][upper] - 3).square().mean()) == pytest.approx(1, abs=0.2)
    assert float(x[..., 1:-half].var()) == pytest.approx(1, abs=0.2)
    over_truth = (x[..., -half:] @ axes).square().mean(dim=(0, 1)) * precision
    assert all(float(part.mean()) == pytest.approx(1, abs=0.2) for part in over_truth.chunk(8))


def test_large_steps_keep_the_variance():
    """At a rate of one over the curvature Euler's steps would double it."""
    p = posteriors.Langevin({0: torch.randn(16, 20, 50, generator=generator())}, {0: standard(50)},
                            1.0, seed=1)
    z, optimiser, variances = p.layers["0"], p.optimiser(2.0), []
    for step in range(200):
        z.grad = z.detach().clone()
        optimiser.step()
        variances.append(float(z.detach().var()))
    assert np.mean(variances[20:]) == pytest.approx(1, abs=0.03)


def test_chains_find_a_conjugate_posterior():
    """Observations of a whitened direction, of a correlated prior; the model's gradient alone is
    used, through the rows."""
    gaussian, count, noise = correlated(6), 24, 1.0
    seen = torch.full((1,), 1.5).double()
    draws = 0.3 * torch.randn(16, 8, 6, generator=generator(), dtype=torch.float64)
    rows = gaussian.mean + draws * gaussian.scale @ gaussian.basis.T
    p = posteriors.Langevin({0: rows}, {0: gaussian}, 1 / 20, seed=0)

    def log_posterior(rows):
        z = (rows.double() - gaussian.mean) @ gaussian.basis / gaussian.scale
        return log_prob(gaussian, rows) - 0.5 * count * ((z[:, 0] - seen) / noise).square().sum()

    fit(p, log_posterior, 1 / 20, 150, 0.5)
    z = p.prompts()[0]
    precision = 1 + count / noise**2
    mean = count * seen / precision
    assert abs(z[..., 0].mean() - mean) < 4 * (precision * 128)**-0.5
    assert stats.kstest(z[..., 0].flatten(), "norm", (mean, precision**-0.5)).pvalue > 1e-3
    assert stats.kstest(z[..., 1:].flatten(), "norm").pvalue > 1e-3
    # the spread over the prior's, of the rows that are kept
    kept = p.tensors()["layers.0.particles"].double()
    fitted = priors.Fitted(*gaussian, gaussian.scale**2, 0.0)
    white = torch.stack([fitted.whiten(rows) for rows in kept])
    assert p.report()["spread"] == pytest.approx(np.var(white.numpy(), axis=0, ddof=1).mean(),
                                                 rel=1e-4)
    assert p.report()["spread"] == pytest.approx((5 + 1 / precision) / 6, rel=0.2)


@pytest.mark.parametrize("kind", [posteriors.Langevin, posteriors.MeanField])
def test_signs_of_eigenvectors_change_nothing(kind):
    """Only rounding: noise is drawn as rows."""
    one, ended = correlated(8), []
    signs = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    rows = torch.randn(2, 3, 8, generator=generator())
    for gaussian in (one, one._replace(basis=one.basis * signs)):
        p = kind({0: rows}, {0: gaussian}, 0.1, seed=0)
        fit(p, lambda x: log_prob(one, x) - (x - 1).square().sum(), 0.1, 20, None)
        ended.append(p.tensors())
    for name, t in ended[0].items():
        torch.testing.assert_close(t, ended[1][name], rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# mean field


def test_mean_field_has_no_floor_and_finds_what_the_data_narrowed():
    """Without data it is the prior, correlated as that is; with data, the conjugate posterior in
    the one direction that they tell of. KL as torch's distributions have it, over whole rows."""
    gaussian, weight, seen = correlated(6), 1 / 50, 2.0
    rows = gaussian.mean + 0.1 * torch.randn(3, 2, 6, generator=generator())

    def likelihood(rows):
        z = (rows[0].double() - gaussian.mean) @ gaussian.basis / gaussian.scale
        return -0.5 * 15 * (z[1] - seen)**2

    for data in (0, 1):
        q = posteriors.MeanField({0: rows}, {0: gaussian}, weight, seed=3)
        fit(q, lambda x: log_prob(gaussian, x) + data * likelihood(x), weight, 1500, 0.05)
        report, ratio = q.report(), q.log_ratio["0"].detach().exp()
        expected = torch.ones(2, 6)
        expected[0, 1] = (1 + 15 * data)**-0.5
        torch.testing.assert_close(ratio, expected, rtol=0.06, atol=0)
        mean = torch.zeros(2, 6)
        mean[0, 1] = data * 15 / 16 * seen
        torch.testing.assert_close(q.layers["0"].detach(), mean, atol=0.25, rtol=0)
        assert report["narrowed"] == data and report["narrowest"] == float(ratio.min())
        assert report["spread"] == pytest.approx(float(ratio.square().mean()))

        covariance = gaussian.basis * gaussian.scale.square() @ gaussian.basis.T
        prior = torch.distributions.MultivariateNormal(gaussian.mean, covariance)
        kl = 0.0
        for mu, r in zip(q.tensors()["layers.0"].double(), ratio.double()):
            axes = gaussian.basis * (gaussian.scale * r).square() @ gaussian.basis.T
            kl += float(torch.distributions.kl_divergence(
                torch.distributions.MultivariateNormal(mu, axes), prior))
        assert report["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-3)
        # The least KL of a Gaussian whose numbers, and not coordinates, are independent.
        floor = len(rows[0]) * (covariance.logdet() + covariance.inverse().diag().log().sum()) / 2
        assert kl < 0.1 * floor or data


def test_draws_are_functions_of_the_seed():
    gaussians = {0: standard(2), 3: standard(2)}
    q = posteriors.MeanField({0: torch.zeros(4, 3, 2), 3: torch.zeros(4, 3, 2)}, gaussians, 0.1,
                             seed=3)
    one, again, next_ = q.members(7)[0], q.members(7)[0], q.members(8)[0]
    assert torch.equal(one[3], again[3]) and not torch.equal(one[3], next_[3])
    alone = posteriors.MeanField({3: torch.zeros(1, 3, 2)}, {3: standard(2)}, 0.1, seed=3)
    assert torch.equal(alone.members(7)[0][3], one[3])  # whatever other layers there are
    kept = q.tensors()
    assert kept["layers.3.particles"].shape == (4, 3, 2)
    assert torch.equal(posteriors.particles(kept, 9, 0)[2][0], kept["layers.0.particles"][2])
    # the standard deviations that early versions kept
    early = {"layers.0": torch.zeros(3, 2), "layers.0.sd": torch.full((3, 2), 0.1)}
    few, many = (posteriors.particles(early, count, 0) for count in (2, 5))
    assert len(many) == 5 and torch.equal(few[1][0], many[1][0])
    rows = torch.stack([r[0] for r in posteriors.particles(early, 2000, 0)])
    assert float(rows.std() / 0.1) == pytest.approx(1, abs=0.03)


def test_the_gaussian_of_a_prior():
    """That which it is, or that of its reference."""
    reference = torch.randn(300, 5, generator=generator()) @ torch.randn(5, 5,
                                                                         generator=generator(1))
    of = lambda prior: gaussian_like(prior, Reference([reference], "any"))
    x = torch.randn(4, 5, generator=generator(2), dtype=torch.float64)
    for prior in (priors.Isotropic.fit(reference, std=0.3), priors.Fitted.fit(reference)):
        g = of(prior)
        law = stats.multivariate_normal(g.mean.double(), (g.basis * g.scale.square()
                                                          @ g.basis.T).double())
        np.testing.assert_allclose(law.logpdf(x.numpy()), prior.log_prob(x), rtol=1e-5)
    fitted = of(priors.Fitted.fit(reference))
    for prior in (priors.Exclusion.fit(reference), priors.Interpolation.fit(reference, -reference)):
        torch.testing.assert_close(of(prior).scale, fitted.scale)


# --------------------------------------------------------------------------------------------------
# minibatches


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_map_holds_on_minibatches(monkeypatch, weight):
    """Every answer token observes the row, those of long answers another place than those of short
    ones. Over an epoch of minibatches the gradient vanishes at the conjugate posterior mean, or
    without a prior at the mean of all tokens. Divided by its own tokens a batch of long answers
    would count too little."""
    lengths = torch.tensor([1, 1, 2, 12, 1, 1, 9, 1])
    seen = torch.where(lengths > 5, 3.0, -1.0)
    tokens = int(lengths.sum())
    mean = (lengths * seen).sum() / (tokens + weight)  # of N(0, 1) before

    def batch(indices, *_):
        labels = torch.full((len(indices), 12), -100)
        for row, i in zip(labels, indices):
            row[:lengths[i]] = i
        return SimpleNamespace(labels=labels, tails=labels)

    def loss(model, rows, batch):
        owners = batch.labels[batch.labels >= 0]
        return 0.5 * (rows - seen[owners]).square().sum(), len(owners)

    monkeypatch.setattr(train, "begin", lambda model, batch, prompt, place: (prompt.layers[0],
                                                                             batch))
    monkeypatch.setattr(train, "answer_loss", loss)
    settings = Settings.from_flags({"batch_size": 2, "prior": "fitted",
                                    "prior_weight": weight}).complete()
    questions = SimpleNamespace(examples=[SimpleNamespace(context="")] * 8, batch=batch)
    loaded = SimpleNamespace(model=None, device="cpu")
    posterior = posteriors.Point({0: mean.view(1, 1, 1)}, {0: 1.0}, 1 / tokens, 0)
    penalty = lambda layers: 0.5 * layers[0].square().sum() / tokens
    training = train.Training(None, settings, loaded, posterior, questions,
                              penalty if weight else None, None, tokens / 8)
    sizes = []
    for step in range(4):
        training.batch = training._batch_of(step)
        training._backward(2)
        gradient = posterior.layers["0"].grad.item()
        sizes.append(abs(gradient - sum(sizes)))
    assert abs(gradient) < 1e-5 and max(sizes) > 0.1
