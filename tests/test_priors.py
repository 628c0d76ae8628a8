"""priors.py against laws of probability, scikit-learn and the paper's own rejection."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, linalg, special, stats
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

import priors


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reference(N=4000, D=12, seed=0):
    """A Gaussian cloud that is neither centred nor round."""
    axes = torch.randn(D, D, generator=seeded(seed + 1))
    return torch.randn(N, D, generator=seeded(seed)) @ axes + 3


def two_clusters(N, D, seed=0):
    """Two Gaussian clouds, of other means and covariances, in random order. One Gaussian is the
    wrong shape. Every seed has the same two clouds."""
    x = torch.randn(2, N // 2, D, generator=seeded(seed)) * torch.arange(1, D + 1) ** -0.5
    axes, _ = torch.linalg.qr(torch.randn(2, D, D, generator=seeded(10)))
    x = x * torch.tensor([1, 3])[:, None, None] @ axes
    x += 3 / D**0.5 * torch.randn(2, 1, D, generator=seeded(11))
    return x.flatten(0, 1)[torch.randperm(N, generator=seeded(seed))]


def fit(name, x, **options):
    """A small fit of any prior on x, and on a second reference if it takes several."""
    prior = priors.PRIORS[name]
    references = (x, 1.3 * x.flip(1) + 2) if prior.several else (x,)
    return prior.fit(*references, **options)


def covariance(prior):
    return prior.basis * prior.scale.square() @ prior.basis.T


@pytest.mark.parametrize("name", priors.PRIORS)
def test_a_draw_is_reproducible_and_of_the_right_shape(name):
    prior = fit(name, reference())
    rows = prior.sample(7, seeded(3))
    assert rows.shape == (7, 12) and rows.dtype == torch.float32
    assert torch.equal(rows, prior.sample(7, seeded(3)))
    assert name == "text" or not torch.equal(rows, prior.sample(7, seeded(4)))
    assert prior.log_prob(rows).shape == (7,) and torch.isfinite(prior.log_prob(rows)).all()
    assert all(isinstance(v, (float, list)) for v in prior.report().values())


def turn_equal_eigenvectors(monkeypatch):
    """Make eigh return other eigenvectors, as right as the first: turned within every space of
    equal eigenvalues, and of other signs."""
    eigh = torch.linalg.eigh

    def turned(matrix):
        values, vectors = eigh(matrix)
        equal = torch.cat((values.new_zeros(1), values.diff())).abs() < 1e-9 * values.abs().max()
        space = (~equal).cumsum(0)
        for s in space.unique():
            columns = (space == s).nonzero()[:, 0]
            turn = torch.randn(len(columns), len(columns), generator=seeded(7), dtype=values.dtype)
            vectors[:, columns] = -vectors[:, columns] @ torch.linalg.qr(turn)[0]
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", turned)


@pytest.mark.parametrize("N, D", [(300, 192), (20, 192)])
@pytest.mark.parametrize("name", ["fitted", "exclusion", "sparse", "interpolation", "vae",
                                  "posterior"])
def test_a_draw_is_a_function_of_the_seed_and_the_reference_alone(name, N, D, monkeypatch):
    """Neither of threads nor of which eigenvectors a decomposition gives: for N < D all of the
    null space have one eigenvalue."""
    x = two_clusters(N, D // 2).repeat(1, 2)  # of half the rank
    options = {"k": 3} if name == "sparse" else {"latent": 3} if name == "vae" else {}
    prior = fit(name, x, **options)
    rows, likelihood = prior.sample(8, seeded(1)), prior.log_prob(x[:8])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    turn_equal_eigenvectors(monkeypatch)
    try:
        other = fit(name, x, **options)
        others = other.sample(8, seeded(1))
    finally:
        torch.set_num_threads(threads)
    assert (others - rows).norm() < 1e-5 * rows.norm()
    torch.testing.assert_close(other.log_prob(x[:8]), likelihood, rtol=1e-4, atol=1e-2)


def test_isotropic():
    prior = priors.Isotropic.fit(reference(), std=0.3)
    x = prior.sample(4000, seeded())
    assert stats.kstest(x.flatten().numpy(), "norm", (0, 0.3)).pvalue > 1e-3
    expected = stats.multivariate_normal(np.zeros(12), 0.09).logpdf(x[:5].double().numpy())
    np.testing.assert_allclose(prior.log_prob(x[:5]), expected, rtol=1e-5)


def test_xavier():
    prior = priors.Xavier.fit(reference())
    x = prior.sample(500, seeded())
    a = math.sqrt(6 / 512)
    assert stats.kstest(x.flatten().numpy(), "uniform", (-a, 2 * a)).pvalue > 1e-3
    expected = torch.nn.init.xavier_uniform_(torch.empty(500, 12))
    assert x.std().item() == pytest.approx(expected.std().item(), rel=0.05)
    assert prior.log_prob(x)[0].item() == pytest.approx(-12 * math.log(2 * a), rel=1e-5)
    assert prior.log_prob(x + 1).tolist() == [-math.inf] * 500


def test_vocab_and_text():
    x = reference(50)
    rows = priors.Vocab.fit(x).sample(50, seeded())
    assert sorted(rows.tolist()) == sorted(x.tolist())  # each once: without replacement
    assert priors.Vocab.fit(torch.cat((x, x))).log_prob(x[:2]).tolist() == pytest.approx(
        [math.log(2 / 100)] * 2)
    assert priors.Vocab.fit(x).log_prob(x[:1] + 1).item() == -math.inf
    with pytest.raises(priors.PriorError, match="51 rows wanted and the reference has 50"):
        priors.Vocab.fit(x).sample(51, seeded())
    text = priors.Text.fit(x[:3])
    assert torch.equal(text.sample(7), x[[0, 1, 2, 0, 1, 2, 0]]) and torch.equal(
        text.sample(2), x[:2])


def test_fitted_has_the_references_moments_and_density():
    x = reference(20000)
    prior = priors.Fitted.fit(x, shrinkage=0)
    draws = prior.sample(40000, seeded(5)).double()
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
    x = reference(N, D)
    prior, theirs = priors.Fitted.fit(x), LedoitWolf().fit(x.double().numpy())
    assert prior.shrinkage == pytest.approx(theirs.shrinkage_, rel=1e-6)
    np.testing.assert_allclose(covariance(prior), theirs.covariance_, rtol=1e-6, atol=1e-8)
    assert torch.isfinite(prior.log_prob(x)).all()


def test_singular_reference():
    x = reference(100, 4) @ torch.randn(4, 20, generator=seeded(8))  # of rank 4
    prior = priors.Fitted.fit(x, shrinkage=0)
    draws = prior.sample(50, seeded())
    assert torch.linalg.matrix_rank(draws.double() - prior.mean, rtol=1e-3) == 4
    assert torch.isfinite(prior.log_prob(draws)).all()


def paper_rejection(law, n, generator):
    """The paper's recipe, whitened: draw wide, keep with probability max(0, 1 - pdf / pdf_wide)."""
    d, kept, tried = law.dim, [], 0
    fitted = stats.multivariate_normal(np.zeros(d), 1.0)
    wide = stats.multivariate_normal(np.zeros(d), law.c_dim)
    while sum(map(len, kept)) < n:
        x = math.sqrt(law.c_dim) * torch.randn(20000, d, generator=generator, dtype=torch.float64)
        probability = np.maximum(0, 1 - np.exp(fitted.logpdf(x.numpy()) - wide.logpdf(x.numpy())))
        u = torch.rand(len(x), generator=generator, dtype=torch.float64).numpy()
        kept.append(x[torch.from_numpy(u < probability)])
        tried += len(x)
    x = torch.cat(kept)
    return x[:n], len(x) / tried


@pytest.mark.parametrize("D, k, options", [(2, 0, {}), (12, 0, {}), (12, 3, {"c": 2.0}),
                                           (12, 5, {"c": 1e4}), (12, 0, {"radius": 1.5})])
def test_exclusion_is_the_papers_law(D, k, options):
    prior = priors.Exclusion.fit(reference(5000, D), k=k, **options)
    law, report = prior.law, prior.report()
    z = prior.whiten(prior.sample(10000, seeded(1)))
    core = z[:, :law.dim]
    radius = core.norm(dim=1)

    expected, acceptance = paper_rejection(law, 10000, seeded(2))
    assert stats.ks_2samp(radius.numpy(), expected.norm(dim=1).numpy()).pvalue > 1e-3
    assert stats.kstest(radius.numpy(), lambda r: law.cdf(torch.as_tensor(r)).numpy()
                        ).pvalue > 1e-3
    assert report["acceptance"] == pytest.approx(acceptance, rel=0.05)
    assert report["radius_drawn"] == pytest.approx(radius.mean().item(), rel=0.01)
    assert radius.min() >= report["radius_excluded"]

    # directions are uniform, so their mean is 0
    mean_direction = (core / radius[:, None]).mean(0).norm().item()
    assert stats.chi2.sf(mean_direction**2 * 10000 * law.dim, law.dim) > 1e-4
    if k:  # the other directions stay the fitted Gaussian
        assert stats.kstest(z[:, k:].square().sum(1).numpy(), "chi2", (D - k,)).pvalue > 1e-3


@pytest.mark.parametrize("dim, fitted, drawn", [(2048, 45.25, 46.16), (2, 1.25, 3.84)])
def test_exclusion_at_the_papers_numbers(dim, fitted, drawn):
    law = priors.RadiusLaw(dim, math.log(5))
    assert law.means() == pytest.approx((fitted, drawn), abs=0.006)
    assert law.sample(20000, seeded()).mean().item() == pytest.approx(law.means()[1], rel=0.005)
    if dim == 2048:
        assert law.c_dim == pytest.approx(1.0016, abs=1e-4)
        assert law.acceptance == pytest.approx(0.020, abs=5e-4)


@pytest.mark.parametrize("dim, m", [(2048, 1.01), (2048, 1.5), (2048, 30.0), (2048, 1e4), (3, 1e4)])
def test_exclusion_by_radius_at_any_width(dim, m):
    """c = m^dim itself would overflow."""
    law = priors.RadiusLaw(dim, dim * math.log(m))
    chi2, r0 = stats.chi2(dim), law.inner
    # the two densities are equal at r0
    assert r0**2 / 2 * (1 - m**-2) == pytest.approx(dim * math.log(m), rel=1e-9)
    assert law.acceptance == pytest.approx(chi2.sf((r0 / m) ** 2) - chi2.sf(r0**2), rel=1e-9)
    radii = law.sample(4000, seeded())
    assert radii.min() >= r0
    assert radii.mean().item() == pytest.approx(law.means()[1], rel=0.02)
    if m == 1.5:
        assert r0 == pytest.approx(54.7, abs=0.05) and 1 - 1e-9 < law.acceptance <= 1


@pytest.mark.parametrize("k", [0, 3])
def test_the_share_of_the_reference_inside_the_excluded_radius(k):
    x = reference(3000, 8)
    prior = priors.Exclusion.fit(x, radius=1.3, k=k, shrinkage=0.0)
    centred = x.double().numpy() - x.double().numpy().mean(0)
    y = centred @ np.linalg.eigh(centred.T @ centred)[1][:, 8 - (k or 8):]
    square = (y @ np.linalg.inv(y.T @ y / 3000) * y).sum(1)
    report = prior.report()
    inside = square < report["radius_excluded"]**2
    assert report["reference_inside"] == pytest.approx(inside.mean())
    assert report["c_dim"] == pytest.approx(1.3**2)
    assert prior.log_prob(prior.sample(50, seeded())).min() > prior.log_prob(x[square < 2]).max()


@pytest.mark.parametrize("k", [0, 2])
def test_exclusion_density_integrates_to_one(k):
    """Importance sampling from a wider Gaussian: the mean of density over density is 1."""
    x = reference(3000, 4)
    prior = priors.Exclusion.fit(x, c=5.0, k=k)
    wide = priors.Fitted.fit(2.5 * (x - x.mean(0)) + x.mean(0), shrinkage=0)
    draws = wide.sample(200_000, seeded(3))
    outside = prior.whiten(draws)[:, :prior.law.dim].norm(dim=1) > prior.law.inner
    weight = (prior.log_prob(draws.double()) - wide.log_prob(draws.double())).exp() * outside
    assert weight.mean().item() == pytest.approx(1.0, abs=5 * weight.std().item() / 200_000**0.5)
    assert weight.std() < 5


@pytest.mark.parametrize("c", [1 + 1e-6, 1.001, 5.0])
def test_exclusions_density_is_scipys_difference_of_two(c):
    """Where nearly nothing is excluded, too: the shell in which it is a slope is thin."""
    prior = priors.Exclusion.fit(reference(200), c=c)
    law, sigma = prior.law, covariance(prior).numpy()
    narrow = stats.multivariate_normal(prior.mean.numpy(), sigma)
    wide = stats.multivariate_normal(prior.mean.numpy(), sigma * law.c_dim)
    rows = prior.sample(200, seeded(3)).double()
    rows = rows[prior.whiten(rows).norm(dim=1) > 1.001 * law.inner].numpy()

    log_wide = wide.logpdf(rows)
    kept = -np.expm1(narrow.logpdf(rows) - log_wide)
    squares = law.inner**2 / law.c_dim, law.inner**2
    acceptance = stats.chi2.sf(squares[0], 12) - stats.chi2.sf(squares[1], 12)
    expected = log_wide + np.log(kept) - math.log(acceptance)
    assert len(rows) > 150
    np.testing.assert_allclose(prior.log_prob(torch.from_numpy(rows)), expected, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, p in priors.PRIORS.items() if p.has_density])
def test_gradient_by_finite_differences(name):
    prior = fit(name, reference(500, 5))
    x = prior.sample(6, seeded()).double()
    assert torch.autograd.gradcheck(prior.log_prob, x.requires_grad_(), eps=1e-5, atol=1e-4)


def moments(x):
    x = x.double()
    return x.mean(0), x.T.cov(correction=0)


def plane(step):
    axis = torch.arange(-20, 20, step, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


@pytest.mark.parametrize("a", [-1.0, 0.5, 0.2])
def test_interpolation_has_the_moments_of_its_law(a):
    """E of (a mu1 + (1 - a) mu2) and of its covariance, over a uniform or fixed."""
    x, y = reference(3000, 4), reference(3000, 4, seed=7) * 2 - 9
    prior = priors.Interpolation.fit(x, y, a=a, shrinkage=0.0)
    (m1, S1), (m2, S2) = moments(x), moments(y)
    first, one, two, varied = (0.5, 1 / 3, 1 / 3, 1 / 12) if a < 0 else (a, a**2, (1 - a)**2, 0)
    mean, spread = moments(prior.sample(200_000, seeded()))
    expected = one * S1 + two * S2 + varied * torch.outer(m1 - m2, m1 - m2)
    away = mean - first * m1 - (1 - first) * m2
    assert (away.square() / expected.diagonal() * 200_000).max() < 4.5**2
    assert (spread - expected).norm() / expected.norm() < 0.02
    share = varied * (m1 - m2).square().sum() / expected.trace()
    assert prior.report()["between"] == pytest.approx(share.item(), rel=1e-3)


@pytest.mark.parametrize("a", [-1.0, 0.3])
def test_interpolation_density(a):
    """Against scipy's integral over a, and its own integral over the plane."""
    x, y = reference(3000, 2), reference(3000, 2, seed=7) * 0.4 - 6
    prior = priors.Interpolation.fit(x, y, a=a, shrinkage=0.0)
    (m1, S1), (m2, S2) = ((m.numpy(), S.numpy()) for m, S in map(moments, (x, y)))

    def density(t, row):
        mean, spread = t * m1 + (1 - t) * m2, t**2 * S1 + (1 - t)**2 * S2
        return stats.multivariate_normal(mean, spread).pdf(row)

    rows = prior.sample(3, seeded()).double() * 1.2
    expected = [integrate.quad(density, 0, 1, (r,), epsabs=0)[0] if a < 0 else density(a, r)
                for r in rows.numpy()]
    np.testing.assert_allclose(prior.log_prob(rows), np.log(expected), atol=1e-4)
    whole = prior.log_prob(plane(0.2)).exp().sum().item() * 0.2**2
    assert whole == pytest.approx(1, abs=2e-3)


def test_interpolation_density_where_a_row_knows_its_share():
    """Each reference is wide where the other is narrow, so a row determines a to about
    1 / sqrt(2 D). A fine sum over s = log(a / (1 - a)) gives the density."""
    D = 400
    wide = torch.tensor([1.0, 1e-3]).repeat_interleave(D // 2)
    x = torch.randn(2000, D, generator=seeded(0)) * wide
    y = torch.randn(2000, D, generator=seeded(1)) * wide.flip(0) + 0.3
    prior = priors.Interpolation.fit(x, y, shrinkage=0.0)
    rows = prior.sample(10, seeded(3)).double()

    (m1, S1), (m2, S2) = ((m.numpy(), S.numpy()) for m, S in map(moments, (x, y)))
    p, joint = linalg.eigh(S1, S1 + S2)  # makes S1 + S2 the identity and S1 diag(p)
    s = np.linspace(-20, 20, 4001)[:, None]
    a, rest = special.expit(s), special.expit(-s)
    variance = a**2 * p + rest**2 * (1 - p)
    mean = (a * m1 + rest * m2) @ joint
    for row, log_prob in zip(rows.numpy() @ joint, prior.log_prob(rows)):
        log = -0.5 * ((row - mean)**2 / variance + np.log(2 * np.pi * variance)).sum(1)
        integral = special.logsumexp(log, b=(a * rest)[:, 0] * (s[1] - s[0]))
        expected = integral - 0.5 * np.linalg.slogdet(S1 + S2)[1]
        assert log_prob.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dim", [0, 1])
def test_sparse_is_the_wide_gaussian_where_neighbours_are_far(dim):
    """An independent rejection, with scikit-learn's neighbours."""
    x = two_clusters(9000, 2) * torch.tensor([1.0, 0.3])  # more than one block of rows
    prior = priors.Sparse.fit(x, k=5, dim=dim, shrinkage=0.0)
    mean, spread = moments(x)
    axes = np.linalg.eigh(spread.numpy())[1][:, ::-1][:, :dim or 2]
    held = np.arange(0, 9000, 10)  # a tenth, spread evenly
    others = np.delete(np.asarray(x, np.float64), held, axis=0) @ axes
    neighbours = NearestNeighbors(n_neighbors=5).fit(others)

    def far(rows):
        distances, _ = neighbours.kneighbors(np.asarray(rows, np.float64) @ axes)
        return distances[:, 4]

    np.testing.assert_allclose(prior.distance(x[held]), far(x[held]), rtol=1e-4, atol=1e-6)
    threshold = np.quantile(far(x[held]), 0.9)
    rows, moved, distance = prior.draw(3000, seeded(1))
    assert prior.threshold == pytest.approx(threshold, rel=1e-4)
    torch.testing.assert_close(distance, prior.distance(rows))
    assert not moved.any() and far(rows).min() > threshold * (1 - 1e-6)
    wide = stats.multivariate_normal(mean.numpy(), 1.5**2 * spread.numpy())
    tried = wide.rvs(60_000, random_state=np.random.default_rng(0))
    kept = tried[far(tried) > threshold]
    for along in ([1, 0], [0, 1], [1, 1]):
        assert stats.ks_2samp(rows.numpy() @ along, kept @ along).pvalue > 1e-3
    assert prior.acceptance == pytest.approx(len(kept) / 60_000, abs=0.06)  # of 1000 draws
    np.testing.assert_allclose(prior.log_prob(rows[:50]),
                               wide.logpdf(rows[:50].numpy()) - math.log(prior.acceptance))
    assert prior.report()["distance_drawn"] > prior.threshold > np.median(far(x[held]))


def test_a_prior_is_the_same_of_a_spectrum_that_is_known_already():
    x = two_clusters(3000, 12)
    spectrum = priors.Spectrum.of(x)
    covariance = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(spectrum.basis * spectrum.variance @ spectrum.basis.T, covariance)
    for kind in (priors.Fitted, priors.Exclusion, priors.Sparse, priors.VAE):
        name = next(name for name, prior in priors.PRIORS.items() if prior is kind)
        assert "spectrum" not in priors.options(name)
        one, other = kind.fit(x), kind.fit(x, spectrum=lambda: spectrum)
        assert torch.equal(one.sample(5, seeded()), other.sample(5, seeded()))
        assert one.report() == other.report()


def test_a_covariance_is_summed_in_strips():
    """Of a width that is no multiple of them."""
    x = torch.randn(900, 2 * priors.STRIP + 30, generator=seeded())
    spectrum = priors.Spectrum.of(x)
    covariance = np.cov(x.double().numpy().T, bias=True)
    np.testing.assert_allclose((spectrum.basis * spectrum.variance @ spectrum.basis.T).numpy(),
                               covariance, atol=1e-13)


@pytest.mark.parametrize("N, n, scale, offset, held_scale", [
    (9000, 2000, 1, 0, 1),  # more rows than a block has
    (300, 90, 1e-6, 0, 1),  # directions of hardly any variance
    (300, 90, 1e-3, 1e4, 1),  # and far from the origin
    (20, 9, 1, 0, 1),  # fewer rows than numbers in each
    (300, 90, 1, 0, 30),  # rows taken off that had nearly all of the variance
    (300, 90, 1, 0, 1e8)])
def test_the_spectrum_of_the_rest_is_that_of_its_rows(N, n, scale, offset, held_scale):
    D, g = 24, seeded()
    scales = torch.logspace(math.log10(scale), 0, D, dtype=torch.float64)
    mixed = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    x = torch.randn(N, D, generator=g, dtype=torch.float64) * scales @ mixed + offset
    is_held = torch.arange(N) % (N // n) == 0
    x[is_held] *= held_scale
    rest, held = x[~is_held], x[is_held]
    found = priors.Spectrum.of_rest(rest, held, *priors.Spectrum.of(x))

    exact = rest.numpy().astype(np.longdouble)
    deviation = exact - exact.mean(0)
    covariance = (deviation.T @ deviation / len(rest)).astype(float)
    size = np.trace(covariance)
    np.testing.assert_allclose(found.mean.numpy(), exact.mean(0).astype(float),
                               atol=1e-10 * (size**0.5 + offset), rtol=0)
    np.testing.assert_allclose((found.basis * found.variance @ found.basis.T).numpy(), covariance,
                               atol=1e-10 * size, rtol=0)
    fourth = np.square(np.square(deviation).sum(1)).mean()
    assert float(found.fourth_moment) == pytest.approx(float(fourth), rel=1e-9)


def test_the_share_inside_is_that_of_many_rows():
    x = torch.randn(3 * priors.INSIDE, 3, generator=seeded()).abs()
    prior = priors.Exclusion.fit(x)
    inside = (prior.whiten(x).norm(dim=1) < prior.law.inner).double().mean()
    assert prior.inside == pytest.approx(float(inside), abs=0.01)


def test_sparse_rows_that_stay_dense_are_moved_away_from_the_mean():
    x = two_clusters(4000, 2)
    prior = priors.Sparse.fit(x, scale=0.01)  # draws all fall in the middle of the reference
    rows, moved, _ = prior.draw(20, seeded())
    assert moved.all() and (prior.distance(rows) > prior.threshold).all()
    back = prior.mean + (rows - prior.mean) / 1.1
    assert (prior.distance(back) <= prior.threshold).all()  # and no farther than needed
    assert prior.report()["moved"] == 1 and torch.isfinite(prior.log_prob(rows)).all()


def test_map_keeps_rows_out_of_the_dense_set():
    """A loss pulls rows into the thick of the reference, with and without MAP."""
    x = two_clusters(4000, 2)
    prior = priors.Sparse.fit(x)
    goal = x[prior.distance(x).argmin()].double()
    for weight, low, high in ((0, 0.0, 0.5), (1, 0.95, 2.0)):
        rows = prior.sample(20, seeded()).double().requires_grad_()
        optimiser = torch.optim.Adam([rows], lr=0.1 * prior.threshold)
        for _ in range(150):
            optimiser.zero_grad()
            (10 * (rows - goal).square().sum() - weight * prior.log_prob(rows).sum()).backward()
            optimiser.step()
        assert low < (prior.distance(rows.detach()) / prior.threshold).median() < high


def mmd(x, y):
    """Unbiased squared maximum mean discrepancy; RBF, its width the median distance in y."""
    x, y = x.double(), y.double()
    width = torch.pdist(y).median()

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / (2 * width**2))

    def within(a):
        return (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def effective_rank(x):
    """Principal directions that hold 95 % of the variance."""
    share = torch.linalg.eigvalsh(moments(x)[1]).flip(0)
    return int((share.cumsum(0) < 0.95 * share.sum()).sum()) + 1


def clusters(N, seed=0):
    """Two plain clusters in 32 dimensions, with hardly a row between them."""
    x = torch.randn(N, 32, generator=seeded(seed))
    sign = 2 * torch.randint(2, (N,), generator=seeded(seed + 1)) - 1
    x[:, 0] = 3 * sign + 0.4 * x[:, 0]
    return x


def ring(N, seed=0):
    """A ring of radius 3 in the first two of 32 dimensions."""
    x = torch.randn(N, 32, generator=seeded(seed))
    angle = 2 * math.pi * torch.rand(N, generator=seeded(seed + 1))
    x[:, :2] = torch.stack((angle.cos(), angle.sin()), 1) * (3 + 0.3 * x[:, :1])
    return x


@pytest.mark.parametrize("rows, size, latents", [(clusters, 1, 1), (ring, 2, 2)])
def test_the_vae_keeps_gaps_empty(rows, size, latents):
    """As empty as real rows leave them. The fitted Gaussian fills them: its share is known."""
    prior = priors.VAE.fit(rows(2000))
    shares = [(x[:, :size].norm(dim=1) < 1.5).double().mean().item()
              for x in (rows(5000, 5), prior.sample(5000, seeded()),
                        priors.Fitted.sample(prior, 5000, seeded()))]
    variance = 9.16 if size == 1 else 4.55  # of each coordinate
    assert shares[0] < 0.001 and shares[1] < 0.01
    assert shares[2] == pytest.approx(stats.chi2.cdf(1.5**2 / variance, size), abs=0.03)
    report = prior.report()
    assert report["latent"] == report["active_units"] == latents  # not all of the 32


def test_the_vae_of_a_gaussian_is_the_fitted_gaussian():
    prior = priors.VAE.fit(reference(2000, 12))
    assert prior.report()["latent"] == 0 and prior.report()["held_out_gain"] == 0
    x = prior.sample(9, seeded())
    torch.testing.assert_close(x, priors.Fitted.sample(prior, 9, seeded()))
    torch.testing.assert_close(prior.log_prob(x), priors.Fitted.log_prob(prior, x))


def test_the_vae_does_not_collapse():
    prior = priors.VAE.fit(two_clusters(4000, 40))
    unseen, draws = two_clusters(2000, 40, seed=1), prior.sample(2000, seeded())
    assert 0.9 < draws.var(0).sum() / unseen.var(0).sum() < 1.1
    assert effective_rank(draws) >= 0.9 * effective_rank(unseen)
    assert mmd(draws, unseen) < 0.2 * mmd(priors.Fitted.sample(prior, 2000, seeded()), unseen)
    x = unseen[:400]  # likelier than under one Gaussian
    assert prior.log_prob(x).mean() > priors.Fitted.log_prob(prior, x).mean() + 3


@pytest.mark.parametrize("N, D", [(4000, 40), (60, 40), (60, 100)])
def test_the_vae_has_the_moments_of_the_fitted_gaussian(N, D):
    """Exactly the mean and the variance along every axis, and nearly the correlations."""
    prior = priors.VAE.fit(two_clusters(N, D), latent=5)
    w = prior.whiten(prior.sample(40_000, seeded(1))) @ prior.axes
    mean, spread = moments(w)
    assert mean.abs().max() < 5 / 200 and (spread.diagonal() - 1).abs().max() < 0.05
    assert (torch.linalg.eigvalsh(spread) - 1).abs().max() < (0.15 if N > 60 else 0.8)


def test_the_vaes_draws_are_new():
    """They are as far from the nearest row that was fitted on as real rows are, give or take."""
    x = two_clusters(3000, 10)
    draws, unseen = priors.VAE.fit(x).sample(500, seeded()), two_clusters(500, 10, seed=1)
    neighbours = NearestNeighbors(n_neighbors=1).fit(x)
    distances = [np.median(neighbours.kneighbors(rows)[0]) for rows in (draws, unseen)]
    assert 0.6 < distances[0] / distances[1] < 1.4


@pytest.mark.parametrize("latent", [0, 1, 2])
def test_the_vaes_density(latent):
    """It is scipy's sum of one Gaussian for every encoded row, integrates to one, and the draws
    have it: the entropy of a histogram of them is minus its mean."""
    prior = priors.VAE.fit(two_clusters(400, 2), latent=latent)
    rows = prior.sample(40_000, seeded(1)).double()
    L = len(prior.kernel)
    out = (prior.basis * prior.scale @ prior.axes).numpy()  # coordinates along axes -> rows
    codes = np.concatenate((prior.codes, np.zeros((320, 2 - L))), 1)
    densities = []
    for code, width in zip(codes, prior.widths.numpy()):
        variance = np.concatenate((prior.kernel.numpy() * width**2, np.ones(2 - L)))
        normal = stats.multivariate_normal(prior.mean.numpy() + out @ code,
                                           out * variance @ out.T)
        densities.append(normal.pdf(rows[:50].numpy()))
    np.testing.assert_allclose(prior.log_prob(rows[:50]), np.log(np.mean(densities, 0)), rtol=1e-6)
    whole = prior.log_prob(plane(0.1)).exp().sum().item() * 0.1**2
    assert whole == pytest.approx(1, abs=0.01)

    edges = np.linspace(-6, 6, 25)
    counts, *_ = np.histogram2d(*rows.numpy().T, bins=(edges, edges))
    fine = torch.from_numpy(np.linspace(-6, 6, 241)[:-1] + 0.025)
    density = prior.log_prob(torch.cartesian_prod(fine, fine)).exp().view(24, 10, 24, 10)
    expected = 40_000 * density.sum((1, 3)).numpy() * 0.05**2
    large = expected > 20
    square = ((counts - expected)**2 / expected)[large].sum()
    assert stats.chi2.sf(square, large.sum()) > 1e-4


def test_the_vae_of_fewer_rows_than_dimensions():
    for N in (20, 60):
        prior, unseen = fit("vae", two_clusters(N, 100)), two_clusters(500, 100, seed=1)
        assert 0.5 < prior.sample(2000, seeded()).var(0).sum() / unseen.var(0).sum() < 2
        assert torch.isfinite(prior.log_prob(unseen)).all()


def test_posterior_is_the_gaussian_of_all_runs_or_their_own_rows():
    runs = [reference(6, 5, seed) for seed in (0, 2)] + [reference(4, 5, 8)]
    prior, resampled = priors.Posterior.fit(*runs), priors.Posterior.fit(*runs, resample=1)
    theirs = LedoitWolf().fit(torch.cat(runs).double().numpy()).covariance_
    np.testing.assert_allclose(covariance(prior.gaussian), theirs, rtol=1e-6, atol=1e-8)
    assert torch.equal(prior.log_prob(runs[0]), resampled.log_prob(runs[0]))
    # row j of some run, from its first again when it is shorter
    assert {[torch.equal(row, r[j % len(r)]) for r in runs].index(True)
            for j, row in enumerate(resampled.sample(40, seeded()))} == {0, 1, 2}
    warm = priors.Posterior.fit(runs[0], resample=1).sample(8, seeded())
    assert torch.equal(warm, torch.cat((runs[0], runs[0][:2])))


def test_one_row_is_a_warm_start():
    """Nothing is fitted until the density is asked for."""
    row = torch.randn(1, 5, generator=seeded())
    prior = priors.Posterior.fit(row, resample=1)
    torch.testing.assert_close(prior.sample(3, seeded()), row.expand(3, 5))
    assert prior.report() == {}
    with pytest.raises(priors.PriorError, match="shrinkage is 7"):
        priors.Posterior.fit(row, resample=1, shrinkage=7)
    with pytest.raises(priors.PriorError, match="cannot be fitted on 1"):
        prior.log_prob(row)
    with pytest.raises(priors.PriorError, match="cannot be fitted on 1"):
        priors.Posterior.fit(row)


def test_map_pushes_strays_out_of_the_excluded_ball():
    prior = priors.Exclusion.fit(reference(2000, 3))
    z = torch.tensor([[0.2, 0.1, 0.0], [0.0, prior.law.inner - 0.1, 0.0]], dtype=torch.float64)
    x = (prior.mean + z * prior.scale @ prior.basis.T).requires_grad_()
    prior.log_prob(x).sum().backward()
    step = prior.whiten(x + 1e-6 * x.grad / x.grad.norm(dim=1, keepdim=True))
    assert (step.norm(dim=1) > z.norm(dim=1)).all()


def test_has_density_is_what_map_needs():
    for name, prior in priors.PRIORS.items():
        fitted = fit(name, reference())
        x = fitted.sample(5, seeded()).requires_grad_()
        p = fitted.log_prob(x)
        useful = p.requires_grad and torch.autograd.grad(p.sum(), x)[0].abs().max() > 0
        assert bool(useful) == prior.has_density, name


@pytest.mark.parametrize("spec, message", [
    ("gauss", "'gauss' is not known: use one of isotropic"),
    ("exclusion:d=3", "no option 'd': it has c, k, radius, shrinkage"),
    ("xavier:a=1", "it has none"),
    ("exclusion:k=two", "k='two': expected a whole number of at most 1000000"),
    ("exclusion:c=inf", "c='inf': expected a number of at most"),
    ("exclusion:radius=1e300", "radius='1e300': expected a number of at most"),
    ("vae:runs/a", "no option 'runs/a'"),
    ("posterior:resample=1", "needs .* posterior:RUN")])
def test_bad_specs(spec, message):
    with pytest.raises(priors.PriorError, match=message):
        priors.parse(spec)


@pytest.mark.parametrize("name, options, x, message", [
    ("isotropic", {"std": 0.0}, reference(9), "std is 0"),
    ("exclusion", {"c": 1 + 1e-7}, reference(9), "c is 1.0000001, expected 1.000001 or more"),
    ("exclusion", {"k": 13}, reference(90), "k is 13"),
    ("fitted", {}, reference(1), "cannot be fitted on 1"),
    ("fitted", {}, torch.full((9, 3), math.nan), "not finite"),
    ("fitted", {}, torch.ones(9, 3), "rows are equal"),
    ("fitted", {"shrinkage": 2.0}, reference(9), "shrinkage is 2"),
    ("fitted", {"shrinkage": -0.3}, reference(9), "shrinkage is -0.3, expected 0 to 1, or -1"),
    ("exclusion", {"radius": 1.0}, reference(9), "is 1.0 and"),
    ("vae", {}, reference(19), "19 ref"),
    ("exclusion", {"radius": 2.0, "c": 4.0}, reference(9), "radius is 2.0 and c is 4.0"),
    ("interpolation", {"a": 1.5}, reference(9), "a is 1.5"),
    ("interpolation", {"a": -0.25}, reference(9), "a is -0.25, expected 0 to 1, or -1"),
    ("vae", {"latent": 13}, reference(90), "latent is 13, expected 1 to 12"),
    ("vae", {}, reference(7).repeat(50, 1), "every reference row has a copy"),
    ("vae", {"latent": 12}, reference(90, 3).repeat(1, 4), "alike in 3 directions"),
    ("sparse", {"quantile": 1.0, "dim": 13}, reference(90), "quantile 1.0, .* 0 to 12"),
    ("sparse", {"k": 82}, reference(90), "k is 82, and 81"),
    ("sparse", {"k": 2}, reference(7).repeat(50, 1), "90% of the reference rows have 2 or more"),
    ("vae", {}, torch.full((90, 3), math.inf), "not finite"),
    ("posterior", {"resample": 2}, reference(9), "resample is 2")])
def test_bad_fits(name, options, x, message):
    with pytest.raises(priors.PriorError, match=message) as raised:
        fit(name, x, **options)
    assert "\n" not in str(raised.value)


def test_spec():
    assert priors.parse("exclusion:c=10,k=16") == ("exclusion", {"c": 10.0, "k": 16}, [])
    assert priors.parse("vocab") == ("vocab", {}, [])
    assert priors.parse("posterior:/a b/c:d,resample=1,runs/e") == (
        "posterior", {"resample": 1}, ["/a b/c:d", "runs/e"])
