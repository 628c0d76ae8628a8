"""Priors over the rows of a prompt, each fitted on a reference population. Needs torch.

A reference is any set of vectors (N, D) that live where the rows will: the vocabulary, the token
embeddings as a data set uses them, or the activations at the input of a deep layer. A prior is
fitted once; then it draws rows and gives their log density:

    prior = PRIORS["exclusion"].fit(embeddings, c=5.0)
    rows = prior.sample(20, torch.Generator().manual_seed(0))  # (20, D) fp32
    prior.log_prob(rows)                                       # (20,) nats; minus this: MAP penalty

A draw is a function of the reference, the options and the generator's seed alone, up to rounding.
Fits are in fp64, densities in log space. This module knows nothing of models or data.
torch is imported inside the functions that need it, so that the registry is read without it.

N reference rows, D width, n prompt rows. `paper` is Exploring Embedding Priors in Prompt-Tuning
(arXiv 2412.18582).
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from typing import TYPE_CHECKING, Callable, Iterator, NamedTuple

if TYPE_CHECKING:
    from torch import Generator, Tensor

BLOCK = 8192  # reference rows that are converted to fp64 at a time: 128k of them would be gigabytes
STRIP = 256  # columns of a covariance that are one product, and rows that are squared at a time
INSIDE = 20_000  # rows that tell a share to a third of a percent


class PriorError(ValueError):
    """A prior that cannot be fitted or do what is asked: what, and the remedy, in one line."""


class Prior:
    """What every prior has, beside report() and the three flags:

    fit(reference (N, D), **options) -> prior, a class method. An option has the type of its
        default: int, float or str. Errors are PriorError. A prior that is made from the Gaussian of
        one reference takes spectrum too, a function that returns its Spectrum.
    sample(n, generator) -> (n, D) fp32
    log_prob(x (n, D)) -> (n,) nats, in x's dtype"""

    has_density = False  # log_prob has a slope that MAP can follow
    several = False  # fit takes each reference as an argument: fit(first, second, ...)
    sources = False  # its references are finished runs, named in the spec

    def report(self) -> dict[str, float]:
        """Figures that say how the fit went."""
        return {}


class Isotropic(Prior):
    """N(0, std^2 I), whatever the reference (paper 3.3)."""

    has_density = True

    def __init__(self, width: int, std: float):
        self.width = width
        self.std = std

    @classmethod
    def fit(cls, reference: Tensor, std: float = 0.02) -> Isotropic:
        if not std > 0:
            raise PriorError(f"isotropic: std is {std}, expected a positive number")
        return cls(reference.shape[1], std)

    def sample(self, n: int, generator: Generator) -> Tensor:
        return self.std * _normal(n, self.width, generator).float()

    def log_prob(self, x: Tensor) -> Tensor:
        D = x.shape[1]
        return (-0.5 * (x / self.std).square().sum(1)
                - D * math.log(self.std * math.sqrt(2 * math.pi)))

    def report(self) -> dict[str, float]:
        return {"std": self.std}


class Xavier(Prior):
    """Uniform in +-sqrt(6 / (n + D)), Xavier's rule for the (n, D) matrix of rows (paper 4.2).
    Flat: no use for MAP."""

    def __init__(self, width: int):
        self.width = width

    @classmethod
    def fit(cls, reference: Tensor) -> Xavier:
        return cls(reference.shape[1])

    def bound(self, n: int) -> float:
        return math.sqrt(6 / (n + self.width))

    def sample(self, n: int, generator: Generator) -> Tensor:
        import torch

        u = torch.rand(n, self.width, generator=generator, dtype=torch.float64)
        return (2 * u - 1).float() * self.bound(n)

    def log_prob(self, x: Tensor) -> Tensor:
        """Of all n rows together, as the bound depends on n; -inf for a row outside the bound."""
        n, D = x.shape
        bound = self.bound(n)
        density = x.new_full((n,), -D * math.log(2 * bound))
        outside = (x.abs() > bound).any(1)
        return density.masked_fill(outside, -math.inf)


class Vocab(Prior):
    """Rows of the reference itself, drawn without replacement: real tokens, or real activations.
    Discrete."""

    def __init__(self, reference: Tensor):
        self.reference = reference

    @classmethod
    def fit(cls, reference: Tensor) -> Vocab:
        return cls(reference.float())

    def sample(self, n: int, generator: Generator) -> Tensor:
        import torch

        N = len(self.reference)
        if n > N:
            raise PriorError(f"vocab: {n} rows wanted and the reference has {N}: ask for fewer, "
                             "or give a larger one")
        drawn = torch.randperm(N, generator=generator)[:n]
        return self.reference[drawn].clone()

    def log_prob(self, x: Tensor) -> Tensor:
        """log of a row's share of the reference, -inf for a row that is not in it."""
        count = x.new_tensor([(self.reference == row).all(1).sum() for row in x])
        return count.log() - math.log(len(self.reference))


class Text(Vocab):
    """The rows of a text (--text), in order, repeated or cut to length. The reference is
    the text's own tokens."""

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        repeats = math.ceil(n / len(self.reference))
        return self.reference.repeat(repeats, 1)[:n].clone()


class Fitted(Prior):
    """N(mu, Sigma), mean and covariance of the reference (paper 3.3, "structured").

    shrinkage is the weight of the identity (trace Sigma / D) I mixed into Sigma; -1 takes the
    Ledoit-Wolf optimum, which makes N < D usable and vanishes for N >> D.

    mean (D,), basis (D, D): Sigma's eigenvectors as columns, by falling variance; scale (D,): the
    standard deviations along them; variance (D,): the reference's own, without shrinkage. All
    fp64."""

    has_density = True

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor, variance: Tensor,
                 shrinkage: float):
        self.mean = mean
        self.basis = basis
        self.scale = scale
        self.variance = variance
        self.shrinkage = shrinkage

    @classmethod
    def fit(cls, reference: Tensor, shrinkage: float = -1.0, *,
            spectrum: Callable[[], Spectrum] | None = None) -> Fitted:
        N, D = reference.shape
        if N < 2:
            raise PriorError(f"a Gaussian cannot be fitted on {N} reference rows: "
                             "give a larger reference")
        _check_shrinkage(shrinkage)
        mean, variance, basis, fourth_moment = spectrum() if spectrum else Spectrum.of(reference)
        trace = variance.sum()
        if not trace > 0:
            raise PriorError("all reference rows are equal, so there is no spread to fit: "
                             "give another reference")

        if shrinkage < 0:
            shrinkage = _ledoit_wolf(variance, fourth_moment, N)
        shrunk = (1 - shrinkage) * variance + shrinkage * trace / D
        # A singular Sigma without shrinkage has zero variances; the floor keeps densities finite.
        scale = shrunk.clamp(min=1e-10 * shrunk[0]).sqrt()
        return cls(mean, basis, scale, variance, shrinkage)

    def whiten(self, x: Tensor, k: int | None = None) -> Tensor:
        """(n, D) -> coordinates fp64 (n, D), or the first k, in which the Gaussian is N(0, I)."""
        return (x.double() - self.mean) @ self.basis[:, :k] / self.scale[:k]

    def unwhiten(self, z: Tensor) -> Tensor:
        """whiten's inverse: coordinates (n, D) fp64 -> rows (n, D) fp64."""
        return self.mean + z * self.scale @ self.basis.T

    def _noise(self, n: int, generator: Generator) -> Tensor:
        """Whitened coordinates (n, D) fp64 of n draws. The noise is drawn in the D coordinates of
        the rows, so that a draw is noise @ basis * scale @ basis.T: the symmetric square root of
        Sigma, whichever eigenvectors of equal variances (all those of variance 0, for N < D) the
        decomposition gave."""
        return _normal(n, len(self.mean), generator) @ self.basis

    def sample(self, n: int, generator: Generator) -> Tensor:
        return self.unwhiten(self._noise(n, generator)).float()

    def log_prob(self, x: Tensor) -> Tensor:
        return self._log_normal(self.whiten(x)).to(x.dtype)

    def _log_normal(self, z: Tensor) -> Tensor:
        """The Gaussian's log density of rows (n, D) given their whitened coordinates z."""
        D = z.shape[1]
        return (-0.5 * z.square().sum(1) - self.scale.log().sum()
                - 0.5 * D * math.log(2 * math.pi))

    def report(self) -> dict[str, float]:
        return {"shrinkage": self.shrinkage}


class Spectrum(NamedTuple):
    """All that a Gaussian takes of its reference (N, D), in fp64."""

    mean: Tensor  # (D,)
    variance: Tensor  # (D,): the covariance's eigenvalues, falling
    basis: Tensor  # (D, D): its eigenvectors as columns
    fourth_moment: Tensor  # (): the mean fourth power of a row's distance to the mean

    @classmethod
    def of(cls, reference: Tensor) -> Spectrum:
        import torch

        N, D = reference.shape
        mean = sum(x.sum(0) for x in _in_double(reference)) / N
        if not torch.isfinite(mean).all():
            raise PriorError("the reference has values that are not finite: find the rows and "
                             "leave them out")
        covariance, fourth_moment = mean.new_zeros(D, D), mean.new_zeros(())
        for x in _in_double(reference, mean):
            fourth_moment += _squares(x).square().sum() / N
            _add_products(covariance, x, N)
        return cls._of(mean, covariance, fourth_moment)

    @classmethod
    def of_rest(cls, rest: Tensor, held: Tensor, *whole: Tensor) -> Spectrum:
        """That of rest (N, D), where `whole` is that of rest and held (n, D) together: in n D^2
        multiplications, not N D^2."""
        N, n = len(rest), len(held)
        mean, variance, basis, _ = whole
        of_held, shift = mean.new_zeros(basis.shape), mean.new_zeros(mean.shape)
        for x in _in_double(held, mean):
            shift += x.sum(0) / N  # by which the rest's mean is below the whole's
            _add_products(of_held, x, N)
        covariance = (1 + n / N) * (basis * variance @ basis.T) - of_held - shift.outer(shift)
        # The rounding is the whole's, and would show where the rest has hardly any of its variance.
        if not covariance.trace() > 1e-4 * variance.sum():
            return cls.of(rest)
        fourth_moment = mean.new_zeros(())
        for x in _in_double(rest, mean - shift):
            fourth_moment += _squares(x).square().sum() / N
        return cls._of(mean - shift, covariance, fourth_moment)

    @classmethod
    def _of(cls, mean: Tensor, covariance: Tensor, fourth_moment: Tensor) -> Spectrum:
        """covariance (D, D): its lower half is enough."""
        import torch

        variance, basis = torch.linalg.eigh(covariance)
        return cls(mean, variance.flip(0), basis.flip(1), fourth_moment)


def _in_double(rows: Tensor, mean: Tensor | None = None) -> Iterator[Tensor]:
    """Blocks of rows (N, D), less the mean (D,), in fp64. Each is in the memory of the one before
    it, because fresh memory takes longer than what is worked out in it."""
    import torch

    memory = rows.new_empty(min(len(rows), BLOCK), rows.shape[1], dtype=torch.float64)
    for block in rows.split(BLOCK):
        x = memory[:len(block)].copy_(block)
        yield x if mean is None else x.sub_(mean)


def _squares(x: Tensor) -> Tensor:
    """The squared lengths (n,) of rows (n, D)."""
    import torch

    return torch.cat([part.square().sum(1) for part in x.split(STRIP)])


def _add_products(total: Tensor, x: Tensor, N: int) -> None:
    """Add x.T @ x / N, of rows x (n, D), to the lower half of total (D, D), which is symmetric:
    half of it is enough, and takes half of the time."""
    for i in range(0, x.shape[1], STRIP):
        total[i:, i:i + STRIP] += x[:, i:].T @ x[:, i:i + STRIP] / N


def _check_shrinkage(shrinkage: float) -> None:
    if not (0 <= shrinkage <= 1 or shrinkage == -1):
        raise PriorError(f"shrinkage is {shrinkage}, expected 0 to 1, or -1 for the Ledoit-Wolf "
                         "optimum")


def _ledoit_wolf(variance: Tensor, fourth_moment: Tensor, N: int) -> float:
    """The optimal weight of the identity (Ledoit and Wolf 2004, lemmas 3.2 to 3.4)."""
    square = variance.square().sum()
    distance_to_identity = square - variance.sum()**2 / len(variance)
    if not distance_to_identity > 0:
        return 1.0
    error = (fourth_moment - square) / N
    return float((error / distance_to_identity).clamp(0, 1))


class Exclusion(Fitted):
    """Outside the dense core: draws of N(mu, c_dim Sigma), c_dim = exp((2 / dim) log c), or
    radius^2 if radius is given, kept with probability max(0, 1 - pdf / pdf_wide) (paper 3.3).
    Exact, with no rejection. k > 0: in the first k principal directions alone.

    At the width of a model c = 5 hardly moves a draw (dim 2048: mean radius 45.25 to 46.16). k > 0
    does, and leaves the fitted Gaussian in the other directions. So does radius, at any width: at
    1.5 and dim 2048 most of the reference lies within r0 (54.7), and draws at 67.9.

    The kept density depends on the Mahalanobis radius alone, so the radius is drawn from its own
    law (RadiusLaw) and the direction uniformly."""

    law: RadiusLaw  # of the radius in the first law.dim whitened coordinates
    inside: float  # share of the reference within the excluded radius; of INSIDE rows at most

    @classmethod
    def fit(cls, reference: Tensor, c: float = 5.0, k: int = 0, radius: float = 0.0,
            shrinkage: float = -1.0, *,
            spectrum: Callable[[], Spectrum] | None = None) -> Exclusion:
        N, D = reference.shape
        least = 1.000001  # nearer to 1 the two densities are equal but for rounding
        if radius and (c != 5.0 or not radius >= least):
            raise PriorError(f"exclusion: radius is {radius} and c is {c}, expected a radius of "
                             f"{least} or more and no c, or no radius")
        if not c >= least:
            raise PriorError(f"exclusion: c is {c}, expected {least} or more")
        if not 0 <= k <= D:
            raise PriorError(f"exclusion: k is {k}, expected 1 to {D} principal directions, "
                             "or 0 for all")

        prior = super().fit(reference, shrinkage, spectrum=spectrum)
        dim = k or D
        # c_dim = radius^2 says c = radius^dim, a number that overflows at the width of a model
        prior.law = RadiusLaw(dim, dim * math.log(radius) if radius else math.log(c))
        rows = reference[_evenly_spaced(N, INSIDE)]
        count = 0.0
        for block in rows.split(BLOCK):
            count += float((prior.whiten(block, dim).norm(dim=1) < prior.law.inner).sum())
        prior.inside = count / len(rows)
        return prior

    def sample(self, n: int, generator: Generator) -> Tensor:
        z = self._noise(n, generator)
        direction = z[:, :self.law.dim]
        direction = direction / direction.norm(dim=1, keepdim=True)
        z[:, :self.law.dim] = direction * self.law.sample(n, generator)[:, None]
        return self.unwhiten(z).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact outside the excluded radius, but for a thin shell at its edge. Inside the true
        density is 0; log_prob goes on as a steep slope there, so that MAP pushes a row that strays
        inside out again instead of stopping on an infinite loss."""
        import torch

        law = self.law
        z = self.whiten(x)
        square = z[:, :law.dim].square().sum(1)

        # The kept share is 1 - e^u with u = log(pdf / pdf_wide), negative outside the excluded
        # radius. From just below 0 on, log(1 - e^u) is replaced by its tangent at `edge`.
        u = law.log_c - square / 2 * (1 - 1 / law.c_dim)
        edge = -1e-4 * min(1.0, law.log_c)
        outside = u.clamp(max=edge)
        slope = math.exp(edge) / math.expm1(edge)
        log_kept = torch.log(-torch.expm1(outside)) + (u - outside) * slope

        log_wide = self._log_normal(z) - u
        return (log_wide + log_kept - math.log(law.acceptance)).to(x.dtype)

    def report(self) -> dict[str, float]:
        """The radius shift: mean radius of the fitted Gaussian and of the draws, r0, and the share
        of the reference that lies within r0."""
        law = self.law
        mean_fitted, mean_drawn = law.means()
        return {**super().report(), "dim": float(law.dim), "c_dim": law.c_dim,
                "acceptance": law.acceptance, "radius_excluded": law.inner,
                "radius_fitted": mean_fitted, "radius_drawn": mean_drawn,
                "reference_inside": self.inside}


class RadiusLaw:
    """The law of an exclusion draw's Mahalanobis radius in dim dimensions; log_c is log c.

    The kept density is (pdf_wide - pdf) / Z outside the radius r0 where the two are equal, so with
    G the chi-square law of dim degrees of freedom the radius has the law
    F(r) = [G(r^2 / c_dim) - G(r0^2 / c_dim) - G(r^2) + G(r0^2)] / Z."""

    def __init__(self, dim: int, log_c: float):
        self.dim = dim
        self.log_c = log_c

    @property
    def c_dim(self) -> float:
        return math.exp(2 / self.dim * self.log_c)

    @property
    def inner(self) -> float:
        """r0, within which nothing is drawn."""
        return math.sqrt(2 * self.log_c / -math.expm1(-2 / self.dim * self.log_c))

    @property
    def acceptance(self) -> float:
        """Z, the share of wide draws that the paper's rejection would keep."""
        return float(self._chi2(self.inner**2)) - float(self._chi2(self.inner**2 / self.c_dim))

    def _chi2(self, square: float | Tensor, degrees: int | None = None) -> Tensor:
        """The chi-square law at squared radii, fp64; of dim degrees of freedom by default."""
        import torch

        square = torch.as_tensor(square, dtype=torch.float64)
        half_degrees = torch.full_like(square, (degrees or self.dim) / 2)
        return torch.special.gammainc(half_degrees, square / 2)

    def cdf(self, r: Tensor) -> Tensor:
        """F at radii r (m,) fp64."""
        r0 = self.inner
        wide = self._chi2(r**2 / self.c_dim) - self._chi2(r0**2 / self.c_dim)
        F = (wide - self._chi2(r**2) + self._chi2(r0**2)) / self.acceptance
        return F.masked_fill(r <= r0, 0.0).clamp(0, 1)

    def sample(self, n: int, generator: Generator) -> Tensor:
        """Radii (n,) fp64 by inverting F."""
        import torch

        u = torch.rand(n, generator=generator, dtype=torch.float64)
        low = torch.full_like(u, self.inner)
        # A draw is sqrt(c_dim) times a chi variable, which never exceeds sqrt(dim) + 40.
        high = torch.full_like(u, math.sqrt(self.c_dim) * (math.sqrt(self.dim) + 40))
        for _ in range(60):  # bisection to the last bit of a double
            middle = (low + high) / 2
            below = self.cdf(middle) < u
            low = torch.where(below, middle, low)
            high = torch.where(below, high, middle)
        return (low + high) / 2

    def means(self) -> tuple[float, float]:
        """The mean radius of the fitted Gaussian, which is the chi law's, and that of the draws."""
        d, r0 = self.dim, self.inner
        chi_mean = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
        # The mean of r over r > r0 is chi_mean P(R > r0), R of the chi law of d + 1 degrees.
        fitted_outside = 1 - float(self._chi2(r0**2, degrees=d + 1))
        wide_outside = 1 - float(self._chi2(r0**2 / self.c_dim, degrees=d + 1))
        kept = math.sqrt(self.c_dim) * wide_outside - fitted_outside
        return chi_mean, chi_mean * kept / self.acceptance


class Interpolation(Prior):
    """A bridge between two references: a x + (1 - a) y of two draws, one from the Gaussian fitted
    on each, with a uniform in [0, 1] for every row (paper 3.3), or fixed (a=0.5 is the published
    code: a blob half-way).

    Given a, a row is N(a mu1 + (1 - a) mu2, a^2 S1 + (1 - a)^2 S2). One linear map, `joint`, makes
    S1 + S2 the identity and both diagonal, p and 1 - p, so that a density costs products alone.

    log_prob integrates over a by the trapezoid rule in s = log(a / (1 - a)), because a row
    determines an a near 0 or 1 to a relative precision. On a peak of width sigma the rule errs by
    exp(-2 pi^2 sigma^2 / step^2), so steps are two thirds of a draw's sigma, which is known from
    the Fisher information of s. At most 8192 steps, which is too few for N < D without shrinkage,
    where a row determines a exactly."""

    has_density, several = True, True

    first: Fitted
    second: Fitted
    joint: Tensor  # (D, D): rows @ joint have the covariances diag(p) and diag(1 - p)
    p: Tensor  # (D,)
    log_det: Tensor  # log |det joint|
    joint_gap: Tensor  # (D,): mu1 - mu2 in joint coordinates
    a: Tensor  # (Q,): the rule's nodes
    log_weight: Tensor  # (Q,)

    @classmethod
    def fit(cls, first: Tensor, second: Tensor, a: float = -1.0,
            shrinkage: float = -1.0) -> Interpolation:
        import torch

        if not (0 <= a <= 1 or a == -1):
            raise PriorError(f"interpolation: a is {a}, expected 0 to 1, or -1 to draw it")
        prior = cls()
        prior.first = Fitted.fit(first, shrinkage)
        prior.second = Fitted.fit(second, shrinkage)

        # Diagonalise S1 + S2, scale it to the identity, and diagonalise S1 in those coordinates.
        S1, S2 = (g.basis * g.scale.square() @ g.basis.T for g in (prior.first, prior.second))
        total, basis = torch.linalg.eigh(S1 + S2)
        white = basis / total.sqrt()
        p, rotation = torch.linalg.eigh(white.T @ S1 @ white)
        prior.p = p.clamp(1e-10, 1 - 1e-10)
        prior.joint = white @ rotation
        prior.log_det = -total.log().sum() / 2
        prior.joint_gap = (prior.first.mean - prior.second.mean) @ prior.joint

        if a < 0:
            prior._set_nodes(*prior._uniform_rule(steps_per_sigma=1.5))
        else:
            prior._set_nodes(p.new_tensor([a]), p.new_zeros(1))
        return prior

    def _variance(self, a: Tensor) -> Tensor:
        """Of rows in joint coordinates: nodes a (Q,) -> (Q, D)."""
        a = a[:, None]
        return a**2 * self.p + (1 - a)**2 * (1 - self.p)

    def _uniform_rule(self, steps_per_sigma: float) -> tuple[Tensor, Tensor]:
        """Nodes (Q,) and the logarithms of their weights, for a uniform in [0, 1]."""
        import torch

        # The Fisher information of s on a fine grid gives 1 / sigma, and so the density of nodes.
        # The 20 keeps nodes where a row says little of a; d variance / da is 2 (a + p - 1).
        grid = torch.linspace(-18, 18, 4097, dtype=torch.float64)
        a = grid.sigmoid()
        variance = self._variance(a)
        slope = (a[:, None] + self.p - 1) / variance
        da_ds = (a - a**2)[:, None]
        information = da_ds**2 * (self.joint_gap.square() / variance + 2 * slope.square())
        density = steps_per_sigma * (information.sum(1) + 20).sqrt()  # nodes to a unit of s

        # Place nodes evenly in the integral of the density, which is inverted linearly.
        nodes_before = torch.cat((grid.new_zeros(1), torch.cumulative_trapezoid(density, grid)))
        count = min(int(nodes_before[-1]), 8192)
        target = nodes_before[-1] * torch.linspace(0, 1, count, dtype=torch.float64)
        right = torch.searchsorted(nodes_before, target).clamp(1, 4096)
        left = right - 1
        part = (target - nodes_before[left]) / (nodes_before[right] - nodes_before[left])
        s = torch.lerp(grid[left], grid[right], part)
        density = torch.lerp(density[left], density[right], part)

        # The weight of a node is da/ds, which is a (1 - a), times the step in s.
        log_weight = (s.sigmoid() * (-s).sigmoid() / density).log().log_softmax(0)
        return s.sigmoid(), log_weight

    def _set_nodes(self, a: Tensor, log_weight: Tensor) -> None:
        """Set the rule's nodes and weights (Q,), and the terms of the nodes' Gaussian densities:
        log density = offset - 0.5 w^2 @ precision + w @ linear for w in joint coordinates."""
        self.a = a
        self.log_weight = log_weight
        variance = self._variance(a)
        mean = a[:, None] * self.joint_gap
        self.precision = (1 / variance).T  # (D, Q)
        self.linear = (mean / variance).T  # (D, Q)
        self.offset = log_weight + self.log_det - 0.5 * (
            mean.square() / variance + variance.log() + math.log(2 * math.pi)).sum(1)

    def sample(self, n: int, generator: Generator) -> Tensor:
        import torch

        x = self.first.unwhiten(self.first._noise(n, generator))
        y = self.second.unwhiten(self.second._noise(n, generator))
        a = self.a
        if len(a) > 1:
            a = torch.rand(n, 1, generator=generator).double()
        return (a * x + (1 - a) * y).float()

    def log_prob(self, x: Tensor) -> Tensor:
        import torch

        w = (x.double() - self.second.mean) @ self.joint  # (n, D)
        log_density = self.offset - 0.5 * w.square() @ self.precision + w @ self.linear  # (n, Q)
        return torch.logsumexp(log_density, 1).to(x.dtype)

    def report(self) -> dict[str, float]:
        """Distance of the means, the same in standard deviations (Mahalanobis, of the mean
        covariance), and the share of the draws' variance that the line between them makes."""
        weight = self.log_weight.exp()
        gap = self.first.mean - self.second.mean
        variance_of_a = (weight * (self.a - weight @ self.a).square()).sum()
        line = variance_of_a * gap.square().sum()
        blobs = 0.0
        for share, gaussian in ((self.a, self.first), (1 - self.a, self.second)):
            blobs += (weight * share.square()).sum() * gaussian.scale.square().sum()
        return {"distance": float(gap.norm()), "separation": float(2**0.5 * self.joint_gap.norm()),
                "between": float(line / (line + blobs)), "nodes": float(len(self.a)),
                "shrinkage_first": self.first.shrinkage, "shrinkage_second": self.second.shrinkage}


class Sparse(Fitted):
    """Where the reference is thin (the kNN sampling that the paper names and leaves): draws of
    N(mu, scale^2 Sigma) that are farther from their k-th nearest reference row than a share
    quantile of real rows are. dim > 0: distances in the first dim principal directions alone.

    In the full width of a model nearly every draw is that far from everything, and this is the wide
    Gaussian: report() tells. The real rows are a tenth of the reference, at most 1000, held out of
    the neighbours. A dense draw is drawn again, up to 50 times; the rows that this accepts have
    exactly the wide density cut to the sparse set. A draw that is dense even then is moved away
    from the mean, a tenth of its distance at a time, until it is sparse."""

    k: int  # which of the nearest neighbours is measured to
    widening: float  # of the wide draws' deviations, over the Gaussian's
    dim: int  # principal directions in which distances are measured; 0: all
    reference: Tensor  # (N, D), as it was given
    points: Tensor  # (N, D) rows, or (N, dim) coordinates fp64, that distances are measured to
    squares: Tensor  # (N,): squared norms of the centred rows; inf for those held out
    held_distances: Tensor  # of the rows held out, which are no neighbours
    threshold: float  # of distances that are sparse

    @classmethod
    def fit(cls, reference: Tensor, k: int = 10, quantile: float = 0.9, scale: float = 1.5,
            dim: int = 0, shrinkage: float = -1.0, *,
            spectrum: Callable[[], Spectrum] | None = None) -> Sparse:
        import torch

        N, D = reference.shape
        if not (0 < quantile < 1 and scale > 0 and 0 <= dim <= D):
            raise PriorError(f"sparse: quantile {quantile}, scale {scale}, dim {dim}: expected a "
                             f"quantile between 0 and 1, a scale above 0, and a dim of 0 to {D}")
        prior = super().fit(reference, shrinkage, spectrum=spectrum)
        held = _evenly_spaced(N, min(max(N // 10, 1), 1000))
        if not 1 <= k <= N - len(held):
            raise PriorError(f"sparse: k is {k}, and {N - len(held)} reference rows can be "
                             "neighbours: give a k of 1 to that, or a larger reference")

        # What distances are measured to. In its full width the reference is not copied: 128k rows
        # of 2048 are a gigabyte.
        prior.reference, prior.k, prior.widening, prior.dim = reference, k, scale, dim
        prior.points = reference
        if dim:
            prior.points = torch.cat([prior.centred(x) for x in reference.split(BLOCK)])
        centred = prior.points.split(BLOCK) if dim else _in_double(reference, prior.mean)
        prior.squares = torch.cat([_squares(x) for x in centred])
        prior.squares[held] = math.inf

        prior.held_distances = prior.distance(reference[held])
        prior.threshold = float(prior.held_distances.quantile(quantile))
        if not prior.threshold > 1e-6 * prior.scale[0]:
            raise PriorError(f"sparse: {quantile:.0%} of the reference rows have {k} or more "
                             "copies: raise k or quantile, or give a reference without copies")
        return prior

    @functools.cached_property
    def acceptance(self) -> float:
        """Share of wide draws that are sparse. Of a large reference it takes seconds."""
        import torch

        wide_draws = self._wide_draws(1000, torch.Generator().manual_seed(0))
        return float((self.distance(wide_draws) > self.threshold).double().mean())

    def centred(self, x: Tensor) -> Tensor:
        """x (n, D) less the mean; with dim its coordinates (n, dim) fp64 in the principal
        directions in which distances are measured."""
        if self.dim:
            return (x.double() - self.mean) @ self.basis[:, :self.dim]
        return x - self.mean

    def distance(self, x: Tensor) -> Tensor:
        """x (n, D) -> distance (n,) fp64 to the k-th nearest reference row."""
        import torch

        # Neighbours are found by matrix products with blocks of rows. In few dimensions they may
        # be so near that the squares cancel, so those products are in fp64.
        q = self.centred(x)
        dtype = torch.float64 if q.shape[1] <= 256 else torch.float32
        twice = 2 * q.detach().to(dtype)
        nearest, neighbours = twice.new_empty(len(q), 0), torch.zeros(len(q), 0).long()
        for start in range(0, len(self.points), BLOCK):
            block = self.points[start : start + BLOCK].to(dtype)
            # |p - q|^2, up to a term that all p share
            scores = self.squares[start : start + BLOCK].to(dtype) - twice @ block.T

            # Keep the k nearest of this block and the earlier ones.
            values, columns = scores.topk(min(self.k, len(block)), largest=False)
            candidates = torch.cat((neighbours, start + columns), 1)
            nearest, columns = torch.cat((nearest, values), 1).topk(
                min(self.k, candidates.shape[1]), largest=False)
            neighbours = candidates.gather(1, columns)

        # The distance itself is computed anew, without cancellation and with its gradient.
        kth_neighbour = self.centred(self.reference[neighbours[:, self.k - 1]])
        return (q - kth_neighbour).norm(dim=1)

    def _wide_draws(self, n: int, generator: Generator) -> Tensor:
        return self.unwhiten(self.widening * self._noise(n, generator))

    def draw(self, n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """-> rows (n, D) fp64, which of them (n,) were moved, and the distances (n,)."""
        import torch

        rows = self.mean.new_empty(n, len(self.mean))
        moved, distance = torch.zeros(n).bool(), self.mean.new_empty(n)
        dense = torch.arange(n)
        tries = 0
        while len(dense):
            if tries < 50:
                rows[dense] = self._wide_draws(len(dense), generator)
            else:
                rows[dense] = self.mean + 1.1 * (rows[dense] - self.mean)
                moved[dense] = True
            distance[dense] = self.distance(rows[dense])
            dense = dense[distance[dense] <= self.threshold]
            tries += 1
        return rows, moved, distance

    def sample(self, n: int, generator: Generator) -> Tensor:
        rows, _, _ = self.draw(n, generator)
        return rows.float()

    def log_prob(self, x: Tensor) -> Tensor:
        """The wide density over its acceptance (that of 1000 draws of a fixed seed) where the
        reference is thin, moved rows apart. Elsewhere the true density is 0; log_prob is a slope in
        the distance to the k-th neighbour there, so steep that MAP keeps rows outside. A row deep
        inside may come to rest in a gap between neighbours."""
        D = x.shape[1]
        log_wide = self._log_normal(self.whiten(x) / self.widening) - D * math.log(self.widening)
        depth = (self.distance(x) / self.threshold - 1).clamp(max=0)
        return (log_wide - math.log(max(self.acceptance, 1e-3)) + 1e4 * depth).to(x.dtype)

    def report(self) -> dict[str, float]:
        """Distances to the k-th neighbour: the threshold, medians of the real rows and of 200 draws
        of a fixed seed, and the share of those draws that were moved."""
        import torch

        _, moved, distance = self.draw(200, torch.Generator().manual_seed(1))
        return {**super().report(), "acceptance": self.acceptance, "threshold": self.threshold,
                "distance_reference": float(self.held_distances.median()),
                "distance_drawn": float(distance.median()),
                "moved": float(moved.double().mean())}


class VAE(Fitted):
    """Draws of a variational autoencoder of the reference (paper 4.6) with linear maps: a latent is
    drawn around an encoded reference row, so that clusters and gaps stay, and decoded with noise.
    The held-out density chooses the number of latents, and so can choose the fitted Gaussian.

    It is an exemplar VAE (Norouzi et al. 2020): the latents' law is the mixture of q(z | row) over
    the reference rows. Row i has q(z | row_i) = N(c_i, width_i^2 diag(kernel)), where width_i is
    proportional to its distance to the nearest other row. Latents are coordinates of the whitened
    rows in those directions in which nearest neighbours are most alike. The decoder adds Gaussian
    noise in all other directions. Encoder and decoder are linear, so the density is exact: a kernel
    density with adaptive widths in the latents, times a Gaussian.

    kernel is width^2 times the mean square that nearest rows differ by, each difference over its
    row's relative distance. The c_i are scaled such that draws have the fitted Gaussian's variance
    in every latent. The number of latents and the width are those of WIDTHS and of powers of two
    that make rows most likely which are not encoded, though the Gaussian is fitted on them, too. At
    most 8192 rows are encoded."""

    WIDTHS = (0.25, 0.35, 0.5, 0.7, 1.0)  # of a kernel, in distances to the nearest row
    SMALLEST = 0.1  # width of a row, in mean widths: a row with copies would have none

    axes: Tensor  # (D, D): whitened rows @ axes have the latents first
    codes: Tensor  # (M, latents): the c_i
    widths: Tensor  # (M,), of mean square 1
    kernel: Tensor  # (latents,): variances of q(z | row) at width 1
    gain: float  # nats by which a held-out row is likelier than under the fitted Gaussian

    @classmethod
    def fit(cls, reference: Tensor, latent: int = 0, shrinkage: float = -1.0, *,
            spectrum: Callable[[], Spectrum] | None = None) -> VAE:
        import torch

        N, D = reference.shape
        if N < 20:
            raise PriorError(f"vae: {N} reference rows are too few: give 20 or more, or use fitted")
        if not 0 <= latent <= D:
            raise PriorError(f"vae: latent is {latent}, expected 1 to {D}, or 0 to choose the "
                             "number by held-out rows")
        prior = super().fit(reference, shrinkage, spectrum=spectrum)
        rows = reference[torch.randperm(N, generator=torch.Generator().manual_seed(0))[:8192]]
        count = min(len(rows) // 5, 400)
        held_out, rows = rows[:count], rows[count:]

        # The kernel's shape is the second moment of the differences between nearest rows.
        u = prior.whiten(rows)
        neighbours, distances = _nearest_other(rows)
        if not distances.any():
            raise PriorError("vae: every reference row has a copy, so there is no distance between "
                             "rows: give a reference without copies, or use fitted")
        widths = distances / distances.square().mean().sqrt()
        widths = widths.clamp(min=cls.SMALLEST)
        prior.widths = widths / widths.square().mean().sqrt()
        differences = (u - u[neighbours]) / prior.widths[:, None]
        shape = differences.T @ differences / len(u)

        # A latent is a direction in which nearest rows are nearer than two rows drawn at random.
        # All that these differ by is known exactly: it is diagonal in whitened coordinates.
        at_random = (prior.variance / prior.scale.square()).diag()
        likeness, axes = torch.linalg.eigh(at_random - shape / 2)
        likeness, prior.axes = likeness.flip(0), axes.flip(1)
        usable = int((likeness > 0.01).sum())
        if latent > usable:
            raise PriorError(f"vae: latent is {latent}, and nearest rows are alike in {usable} "
                             f"directions: ask for at most {usable}, or give a larger reference")
        counts = [latent] if latent else [*_powers_of_two(usable), usable]
        u = u - u.mean(0)
        prior._choose(u @ prior.axes, (prior.axes.T @ shape @ prior.axes).diagonal(),
                      prior.whiten(held_out) @ prior.axes, counts, may_be_gaussian=not latent)
        return prior

    def _choose(self, w: Tensor, shape: Tensor, held_out: Tensor, counts: list[int],
                may_be_gaussian: bool) -> None:
        """Choose the number of latents, of counts, and the kernel's width.

        w (M, D), held_out (n, D): rows in coordinates along axes. shape (D,): the kernel's
        variances at width 1."""
        deviation = w.square().mean(0).sqrt()
        self.codes, self.kernel = w[:, :0], shape[:0]
        gaussian = float(self._log_density(held_out).mean())
        best = gaussian if may_be_gaussian else -math.inf
        for latents in counts:
            for width in self.WIDTHS:
                tried = self.codes, self.kernel
                self.kernel = (width**2 * shape[:latents]).clamp(1e-6, 0.95)
                self.codes = w[:, :latents] * ((1 - self.kernel).sqrt() / deviation[:latents])
                density = float(self._log_density(held_out).mean())
                if density > best:
                    best = density
                else:
                    self.codes, self.kernel = tried
        self.gain = best - gaussian

    def sample(self, n: int, generator: Generator) -> Tensor:
        import torch

        w = self._noise(n, generator) @ self.axes
        row = torch.randint(len(self.widths), (n,), generator=generator)
        latents = len(self.kernel)
        deviation = self.kernel.sqrt() * self.widths[row, None]
        w[:, :latents] = self.codes[row] + w[:, :latents] * deviation
        return self.unwhiten(w @ self.axes.T).float()

    def log_prob(self, x: Tensor) -> Tensor:
        import torch

        blocks = [self._log_density(self.whiten(block) @ self.axes) for block in x.split(1024)]
        return (torch.cat(blocks) - self.scale.log().sum()).to(x.dtype)

    def _log_density(self, w: Tensor) -> Tensor:
        """Of whitened rows in coordinates along axes, (n, D) -> (n,)."""
        import torch

        latents, D = len(self.kernel), w.shape[1]
        z = w[:, :latents] / self.kernel.sqrt()
        codes = self.codes / self.kernel.sqrt()
        squares = z.square().sum(1)[:, None] - 2 * z @ codes.T + codes.square().sum(1)  # (n, M)
        log_kernels = -0.5 * squares / self.widths.square() - latents * self.widths.log()
        mixture = torch.logsumexp(log_kernels, 1) - math.log(len(codes))
        noise = -0.5 * w[:, latents:].square().sum(1)
        return mixture + noise - 0.5 * (self.kernel.log().sum() + D * math.log(2 * math.pi))

    def report(self) -> dict[str, float]:
        """Latents chosen, those among them that are active (their codes vary by more than 0.01,
        Burda et al. 2016), the largest and smallest share of a latent's variance that its kernel
        has, and nats by which held-out rows are likelier than under the fitted Gaussian."""
        active = (self.codes.square().mean(0) > 0.01).sum()
        return {**super().report(), "latent": float(len(self.kernel)),
                "active_units": float(active), "encoded_rows": float(len(self.widths)),
                "kernel_min": float(self.kernel.min()) if len(self.kernel) else 1.0,
                "kernel_max": float(self.kernel.max()) if len(self.kernel) else 1.0,
                "held_out_gain": self.gain}


def _nearest_other(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row (M, D) the nearest other one: index (M,), and distance (M,) fp64."""
    import torch

    # In fp64, so that rounding does not decide which of two rows is nearer.
    x = rows.double()
    x = x - x.mean(0)
    squares = x.square().sum(1)
    nearest = []
    for start in range(0, len(x), 1024):
        scores = squares - 2 * x[start : start + 1024] @ x.T  # |p - q|^2, up to a term of q
        indices = torch.arange(len(scores))
        scores[indices, start + indices] = math.inf
        nearest.append(scores.argmin(1))
    index = torch.cat(nearest)
    return index, (x - x[index]).norm(dim=1)


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4 and so on below the limit."""
    return [2**k for k in range(limit.bit_length()) if 2**k < limit]


class Posterior(Prior):
    """What earlier runs learned, as the prior of the next task (posterior:RUN,RUN,...): the
    Gaussian of all their final rows. resample=1 takes the rows themselves, row j from row j of a
    run picked at random, so that one run alone is a warm start.

    The use that the paper names for trained prompts (paper 5). log_prob is the Gaussian's also with
    resample=1: MAP holds rows near where earlier prompts ended."""

    has_density = True
    several, sources = True, True

    def __init__(self, runs: list[Tensor], resample: bool, shrinkage: float):
        """runs: rows (n, D) each."""
        self.runs = runs
        self.resample = resample
        self.shrinkage = shrinkage

    @classmethod
    def fit(cls, *runs: Tensor, resample: int = 0, shrinkage: float = -1.0) -> Posterior:
        if resample not in (0, 1):
            raise PriorError(f"posterior: resample is {resample}, expected 0, or 1 for rows")
        _check_shrinkage(shrinkage)
        prior = cls([rows.float() for rows in runs], bool(resample), shrinkage)
        if not resample:
            prior.gaussian  # refuses what cannot be fitted
        return prior

    @functools.cached_property
    def gaussian(self) -> Fitted:
        """Fitted when it is first asked for: a warm start needs none, and one row has none."""
        import torch

        return Fitted.fit(torch.cat(self.runs), self.shrinkage)

    def sample(self, n: int, generator: Generator) -> Tensor:
        import torch

        if not self.resample:
            return self.gaussian.sample(n, generator)
        chosen = torch.randint(len(self.runs), (n,), generator=generator).tolist()
        drawn = []
        for j, run in enumerate(chosen):
            rows = self.runs[run]
            drawn.append(rows[j % len(rows)])
        return torch.stack(drawn)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.gaussian.log_prob(x)

    def report(self) -> dict[str, float]:
        return {} if self.resample else self.gaussian.report()


def _normal(n: int, width: int, generator: Generator) -> Tensor:
    import torch

    return torch.randn(n, width, generator=generator, dtype=torch.float64)


def _evenly_spaced(N: int, most: int) -> Tensor:
    """At most `most` indices, spread evenly over N rows."""
    import torch

    count = min(N, most)
    return torch.arange(count) * N // count


# To add a prior, write its class above and name it here: --prior, --help and most tests take it
# from this table. The arguments of fit are its options, the docstring's first paragraph its help.
PRIORS = {
    "isotropic": Isotropic,
    "xavier": Xavier,
    "vocab": Vocab,
    "text": Text,
    "fitted": Fitted,
    "exclusion": Exclusion,
    "interpolation": Interpolation,
    "sparse": Sparse,
    "vae": VAE,
    "posterior": Posterior,
}


def options(name: str) -> dict[str, object]:
    """A prior's options and their defaults, from the signature of its fit. A spectrum, which is
    None by default, is none."""
    parameters = inspect.signature(PRIORS[name].fit).parameters.values()
    return {p.name: p.default for p in parameters if p.default not in (p.empty, None)}


def parse(spec: str) -> tuple[str, dict[str, object], list[str]]:
    """A prior's name, the options given, and its sources.

    "exclusion:c=10,k=16" -> ("exclusion", {"c": 10.0, "k": 16}, []);
    "posterior:runs/a,runs/b,resample=1" -> ("posterior", {"resample": 1}, ["runs/a", "runs/b"]).
    A comma in a source is written as \\,."""
    name, _, rest = spec.partition(":")
    if name not in PRIORS:
        raise PriorError(f"prior {name!r} is not known: use one of {', '.join(PRIORS)}")

    takes_sources = PRIORS[name].sources
    given, sources = {}, []
    for part in filter(None, re.split(r"(?<!\\),", rest)):
        key, equals, text = part.partition("=")
        if takes_sources and not (equals and key in options(name)):
            sources.append(part.replace("\\,", ","))
        else:
            given[key] = _option(name, key, text)

    if takes_sources and not sources:
        raise PriorError(f"prior {name} needs the folders of finished runs: write {name}:RUN, or "
                         f"{name}:RUN,RUN")
    return name, given, sources


LARGEST_OPTION = 1e6  # products and powers of such numbers are finite


def _option(name: str, key: str, text: str) -> object:
    """The value of an option, in the type of its default."""
    known = options(name)
    if key not in known:
        raise PriorError(f"prior {name!r} has no option {key!r}: it has "
                         f"{', '.join(known) or 'none'}")
    type_ = type(known[key])
    try:
        value = type_(text)
        if type_ in (int, float) and not abs(value) <= LARGEST_OPTION:
            raise ValueError
    except ValueError:
        kind = "a whole number" if type_ is int else "a number"
        raise PriorError(f"prior {name}: {key}={text!r:.80}: expected {kind} of at most "
                         f"{LARGEST_OPTION:.0f}") from None
    return value
