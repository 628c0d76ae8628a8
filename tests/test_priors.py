"""priors.py against laws of probability, scikit-learn and the paper's own rejection."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import priors

G = lambda seed=0: torch.Generator().manual_seed(seed)


def reference(N=4000, D=12, seed=0):
    """A Gaussian cloud that is neither centred nor round."""
    return torch.randn(N, D, generator=G(seed)) @ torch.randn(D, D, generator=G(seed + 1)) + 3


@pytest.mark.parametrize("name", priors.PRIORS)
def test_a_draw_is_reproducible_and_of_the_right_shape(name):
    prior = priors.PRIORS[name].fit(reference())
    rows = prior.sample(7, G(3))
    assert rows.shape == (7, 12) and rows.dtype == torch.float32
    assert torch.equal(rows, prior.sample(7, G(3)))
    assert name == "text" or not torch.equal(rows, prior.sample(7, G(4)))
    assert prior.log_prob(rows).shape == (7,) and torch.isfinite(prior.log_prob(rows)).all()
    assert all(isinstance(v, float) for v in prior.report().values())


def test_isotropic():
    prior = priors.Isotropic.fit(reference(), std=0.3)
    x = prior.sample(4000, G())
    assert stats.kstest(x.flatten().numpy(), "norm", (0, 0.3)).pvalue > 1e-3
    expected = stats.multivariate_normal(np.zeros(12), 0.09).logpdf(x[:5].double().numpy())
    np.testing.assert_allclose(prior.log_prob(x[:5]), expected, rtol=1e-5)


def test_xavier():
    prior = priors.Xavier.fit(reference())
    x = prior.sample(500, G())
    a = math.sqrt(6 / 512)
    assert stats.kstest(x.flatten().numpy(), "uniform", (-a, 2 * a)).pvalue > 1e-3
    expected = torch.nn.init.xavier_uniform_(torch.empty(500, 12))
    assert x.std().item() == pytest.approx(expected.std().item(), rel=0.05)
    assert prior.log_prob(x)[0].item() == pytest.approx(-12 * math.log(2 * a), rel=1e-5)
    assert prior.log_prob(x + 1).tolist() == [-math.inf] * 500


def test_vocab_and_text():
    x = reference(50)
    rows = priors.Vocab.fit(x).sample(50, G())
    assert sorted(rows.tolist()) == sorted(x.tolist())  # each once: without replacement
    assert priors.Vocab.fit(torch.cat((x, x))).log_prob(x[:2]).tolist() == pytest.approx(
        [math.log(2 / 100)] * 2)
    assert priors.Vocab.fit(x).log_prob(x[:1] + 1).item() == -math.inf
    with pytest.raises(priors.PriorError, match="51 rows wanted and the reference has 50"):
        priors.Vocab.fit(x).sample(51, G())
    text = priors.Text.fit(x[:3])
    assert torch.equal(text.sample(7), x[[0, 1, 2, 0, 1, 2, 0]]) and torch.equal(
        text.sample(2), x[:2])


def test_fitted_has_the_references_moments_and_density():
    x = reference(20000)
    prior = priors.Fitted.fit(x, shrinkage=0)
    draws = prior.sample(40000, G(5)).double()
    spread = x.double().T.cov(correction=0)
    assert (draws.mean(0) - x.double().mean(0)).abs().max() < 4 * (
        spread.diagonal().max() / 40000) ** 0.5
    assert (draws.T.cov() - spread).norm() / spread.norm() < 0.03
    radius = prior.whiten(draws).square().sum(1)
    assert stats.kstest(radius[:5000].numpy(), "chi2", (12,)).pvalue > 1e-3
    exact = stats.multivariate_normal(x.double().mean(0).numpy(), spread.numpy())
    np.testing.assert_allclose(prior.log_prob(draws[:9]), exact.logpdf(draws[:9].numpy()),
                               rtol=1e-6)


@pytest.mark.parametrize("N, D", [(3000, 12), (30, 12), (10, 40)])
def test_shrinkage_is_ledoit_and_wolfs(N, D):
    from sklearn.covariance import LedoitWolf

    x = reference(N, D)
    prior, theirs = priors.Fitted.fit(x), LedoitWolf().fit(x.double().numpy())
    assert prior.shrinkage == pytest.approx(theirs.shrinkage_, rel=1e-6)
    ours = prior.basis * prior.scale.square() @ prior.basis.T
    np.testing.assert_allclose(ours, theirs.covariance_, rtol=1e-6, atol=1e-8)
    assert torch.isfinite(prior.log_prob(x)).all()


def test_singular_reference():
    x = reference(100, 4) @ torch.randn(4, 20, generator=G(8))  # of rank 4
    prior = priors.Fitted.fit(x, shrinkage=0)
    draws = prior.sample(50, G())
    assert torch.linalg.matrix_rank(draws.double() - prior.mean, rtol=1e-3) == 4
    assert torch.isfinite(prior.log_prob(draws)).all()


def paper_rejection(prior, n, generator):
    """The paper's recipe, whitened: draw wide, keep with probability max(0, 1 - pdf / pdf_wide)."""
    d, kept, tried = prior.dim, [], 0
    while sum(map(len, kept)) < n:
        x = math.sqrt(prior.c_dim) * torch.randn(20000, d, generator=generator, dtype=torch.float64)
        pdf = stats.multivariate_normal(np.zeros(d), 1.0).logpdf(x.numpy())
        wide = stats.multivariate_normal(np.zeros(d), prior.c_dim).logpdf(x.numpy())
        keep = torch.rand(len(x), generator=generator, dtype=torch.float64).numpy() < np.maximum(
            0, 1 - np.exp(pdf - wide))
        kept.append(x[torch.from_numpy(keep)])
        tried += len(x)
    x = torch.cat(kept)
    return x[:n], len(x) / tried


@pytest.mark.parametrize("D, k, c", [(2, 0, 5.0), (12, 0, 5.0), (12, 3, 2.0), (12, 5, 1e4)])
def test_exclusion_is_the_papers_law(D, k, c):
    prior = priors.Exclusion.fit(reference(5000, D), c=c, k=k)
    z = prior.whiten(prior.sample(10000, G(1)))
    radius = z[:, :prior.dim].norm(dim=1)
    expected, acceptance = paper_rejection(prior, 10000, G(2))
    assert stats.ks_2samp(radius.numpy(), expected.norm(dim=1).numpy()).pvalue > 1e-3
    assert stats.kstest(radius.numpy(), lambda r: prior.radius_law(torch.as_tensor(r)).numpy()
                        ).pvalue > 1e-3
    assert prior.acceptance == pytest.approx(acceptance, rel=0.05)
    report = prior.report()
    assert report["radius_drawn"] == pytest.approx(radius.mean().item(), rel=0.01)
    assert radius.min() >= prior.inner and report["radius_excluded"] == prior.inner
    direction = (z[:, :prior.dim] / radius[:, None]).mean(0).norm() * 10000**0.5
    # uniform directions: mean at 0
    assert stats.chi2.sf(direction.item() ** 2 * prior.dim, prior.dim) > 1e-4
    if k:  # the other directions stay the fitted Gaussian
        assert stats.kstest(z[:, k:].square().sum(1).numpy(), "chi2", (D - k,)).pvalue > 1e-3


@pytest.mark.parametrize("dim, fitted, drawn", [(2048, 45.25, 46.16), (2, 1.25, 3.84)])
def test_exclusion_at_the_papers_numbers(dim, fitted, drawn):
    prior = priors.Exclusion(None, None, None, 0.0)
    prior.c, prior.dim = 5.0, dim
    report = prior.report()
    assert report["radius_fitted"] == pytest.approx(fitted, abs=0.006)
    assert report["radius_drawn"] == pytest.approx(drawn, abs=0.006)
    radii = prior.radii(20000, G())
    assert radii.mean().item() == pytest.approx(report["radius_drawn"], rel=0.005)
    if dim == 2048:
        assert prior.c_dim == pytest.approx(1.0016, abs=1e-4) and prior.acceptance == pytest.approx(
            0.020, abs=5e-4)


@pytest.mark.parametrize("k", [0, 2])
def test_exclusion_density_integrates_to_one(k):
    """Importance sampling from a wider Gaussian: the mean of density over density is 1."""
    x = reference(3000, 4)
    prior = priors.Exclusion.fit(x, c=5.0, k=k)
    wide = priors.Fitted.fit(x, shrinkage=0)
    wide.scale = wide.scale * 2.5
    draws = wide.sample(200_000, G(3))
    outside = prior.whiten(draws)[:, :prior.dim].norm(dim=1) > prior.inner
    weight = (prior.log_prob(draws.double()) - wide.log_prob(draws.double())).exp() * outside
    assert weight.mean().item() == pytest.approx(1.0, abs=5 * weight.std().item() / 200_000**0.5)
    assert weight.std() < 5


@pytest.mark.parametrize("name", ["isotropic", "fitted", "exclusion"])
def test_gradient_by_finite_differences(name):
    prior = priors.PRIORS[name].fit(reference(500, 5))
    x = prior.sample(6, G()).double()
    assert torch.autograd.gradcheck(lambda x: prior.log_prob(x), x.requires_grad_(), eps=1e-5,
                                    atol=1e-4)


def test_map_pushes_strays_out_of_the_excluded_ball():
    prior = priors.Exclusion.fit(reference(2000, 3))
    z = torch.tensor([[0.2, 0.1, 0.0], [0.0, prior.inner - 0.1, 0.0]], dtype=torch.float64)
    x = (prior.mean + z * prior.scale @ prior.basis.T).requires_grad_()
    prior.log_prob(x).sum().backward()
    step = prior.whiten(x + 1e-6 * x.grad / x.grad.norm(dim=1, keepdim=True))
    assert (step.norm(dim=1) > z.norm(dim=1)).all()


def test_has_density_is_what_map_needs():
    for name, prior in priors.PRIORS.items():
        fitted = prior.fit(reference())
        x = fitted.sample(5, G()).requires_grad_()
        p = fitted.log_prob(x)
        useful = p.requires_grad and torch.autograd.grad(p.sum(), x)[0].abs().max() > 0
        assert bool(useful) == prior.has_density, name


@pytest.mark.parametrize("spec, message", [
    ("gauss", "'gauss' is not known: use one of isotropic"),
    ("exclusion:d=3", "no option 'd': it has c, k, shrinkage"), ("xavier:a=1", "it has none"),
    ("exclusion:k=two", "k='two' is not a finite int"),
    ("exclusion:c=inf", "c='inf' is not a finite float")])
def test_bad_specs(spec, message):
    with pytest.raises(priors.PriorError, match=message):
        priors.parse(spec)


@pytest.mark.parametrize("name, options, x, message", [
    ("isotropic", {"std": 0.0}, reference(9), "std is 0"),
    ("exclusion", {"c": 1.0}, reference(9), "c is 1"),
    ("exclusion", {"k": 13}, reference(90), "k is 13"),
    ("fitted", {}, reference(1), "cannot be fitted on 1"),
    ("fitted", {}, torch.full((9, 3), math.nan), "not finite"),
    ("fitted", {}, torch.ones(9, 3), "rows are equal"),
    ("fitted", {"shrinkage": 2.0}, reference(9), "shrinkage is 2")])
def test_bad_fits(name, options, x, message):
    with pytest.raises(priors.PriorError, match=message):
        priors.PRIORS[name].fit(x, **options)


def test_spec():
    assert priors.parse("exclusion:c=10,k=16") == ("exclusion", {"c": 10.0, "k": 16})
    assert priors.parse("vocab") == ("vocab", {})
