"""Priors over the rows of a prompt, each fitted on a reference population. Needs torch.

A reference is any set of vectors (N, D) that live where the rows will: the vocabulary, the token
embeddings as a data set uses them, or the activations at the input of a deep layer. A prior is
fitted once; then it draws rows and gives their log density:

    prior = PRIORS["exclusion"].fit(embeddings, c=5.0)
    rows = prior.sample(20, torch.Generator().manual_seed(0))  # (20, D) fp32
    prior.log_prob(rows)                                       # (20,) nats; minus this: MAP penalty

A draw is a function of the reference, the options and the generator's seed alone. Fits are in fp64
(a network's training in fp32), densities in log space. This module knows nothing of models or data.
torch is imported inside the functions that need it, so that the registry is read without it.

N reference rows, D width, n prompt rows. `paper` is Exploring Embedding Priors in Prompt-Tuning
(arXiv 2412.18582).
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

BLOCK = 8192  # reference rows that are converted to fp64 at a time: 128k of them would be gigabytes


class PriorError(ValueError):
    """A prior that cannot be fitted or do what is asked: what, and the remedy, in one line."""


class Prior:
    """What every prior has, beside report() and the three flags:

    fit(reference (N, D), **options) -> prior, a class method. An option has the type of its
        default: int, float or str. Errors are PriorError.
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
    standard deviations along them. All fp64."""

    has_density = True

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor, shrinkage: float):
        self.mean = mean
        self.basis = basis
        self.scale = scale
        self.shrinkage = shrinkage

    @classmethod
    def fit(cls, reference: Tensor, shrinkage: float = -1.0) -> Fitted:
        import torch

        N, D = reference.shape
        if N < 2:
            raise PriorError(f"a Gaussian cannot be fitted on {N} reference rows: "
                             "give a larger reference")
        if shrinkage > 1:
            raise PriorError(f"shrinkage is {shrinkage}, expected 0 to 1, or -1 for the "
                             "Ledoit-Wolf optimum")
        mean, covariance, fourth_moment = _moments(reference)
        trace = covariance.trace()
        if not trace > 0:
            raise PriorError("all reference rows are equal, so there is no spread to fit: "
                             "give another reference")

        if shrinkage < 0:
            shrinkage = _ledoit_wolf(covariance, fourth_moment, N)
        variance, basis = torch.linalg.eigh(covariance)
        variance, basis = variance.flip(0), basis.flip(1)
        variance = (1 - shrinkage) * variance + shrinkage * trace / D
        # A singular Sigma without shrinkage has zero variances; the floor keeps densities finite.
        scale = variance.clamp(min=1e-10 * variance[0]).sqrt()
        return cls(mean, basis, scale, shrinkage)

    def whiten(self, x: Tensor, k: int | None = None) -> Tensor:
        """(n, D) -> coordinates fp64 (n, D), or the first k, in which the Gaussian is N(0, I)."""
        return (x.double() - self.mean) @ self.basis[:, :k] / self.scale[:k]

    def unwhiten(self, z: Tensor) -> Tensor:
        """whiten's inverse: coordinates (n, D) fp64 -> rows (n, D) fp64."""
        return self.mean + z * self.scale @ self.basis.T

    def sample(self, n: int, generator: Generator) -> Tensor:
        return self.unwhiten(_normal(n, len(self.mean), generator)).float()

    def log_prob(self, x: Tensor) -> Tensor:
        return self._log_normal(self.whiten(x)).to(x.dtype)

    def _log_normal(self, z: Tensor) -> Tensor:
        """The Gaussian's log density of rows (n, D) given their whitened coordinates z."""
        D = z.shape[1]
        return (-0.5 * z.square().sum(1) - self.scale.log().sum()
                - 0.5 * D * math.log(2 * math.pi))

    def report(self) -> dict[str, float]:
        return {"shrinkage": self.shrinkage}


def _moments(reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows (N, D), in fp64: the mean (D,), the covariance (D, D), and the mean fourth power of a
    row's distance to the mean."""
    import torch

    N, D = reference.shape
    # By blocks, because a sum in another type makes a copy of all that it adds.
    mean = sum(block.sum(0, dtype=torch.float64) for block in reference.split(BLOCK)) / N
    if not torch.isfinite(mean).all():
        raise PriorError("the reference has values that are not finite: find the rows and "
                         "leave them out")
    covariance = torch.zeros(D, D, dtype=torch.float64, device=reference.device)
    fourth_moment = torch.zeros((), dtype=torch.float64, device=reference.device)
    for block in reference.split(BLOCK):
        x = block.double() - mean
        covariance += x.T @ x / N
        fourth_moment += x.square().sum(1).square().sum() / N
    return mean, covariance, fourth_moment


def _ledoit_wolf(covariance: Tensor, fourth_moment: Tensor, N: int) -> float:
    """The optimal weight of the identity (Ledoit and Wolf 2004, lemmas 3.2 to 3.4)."""
    D = len(covariance)
    square = covariance.square().sum()
    distance_to_identity = square - covariance.trace()**2 / D
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
    inside: float  # share of the reference within the excluded radius

    @classmethod
    def fit(cls, reference: Tensor, c: float = 5.0, k: int = 0, radius: float = 0.0,
            shrinkage: float = -1.0) -> Exclusion:
        N, D = reference.shape
        if radius and (c != 5.0 or not radius > 1):
            raise PriorError(f"exclusion: radius is {radius} and c is {c}, expected a radius of "
                             "more than 1 and no c, or no radius")
        if not c > 1:
            raise PriorError(f"exclusion: c is {c}, expected more than 1")
        if not 0 <= k <= D:
            raise PriorError(f"exclusion: k is {k}, expected 1 to {D} principal directions, "
                             "or 0 for all")

        prior = super().fit(reference, shrinkage)
        dim = k or D
        # c_dim = radius^2 says c = radius^dim, a number that overflows at the width of a model
        prior.law = RadiusLaw(dim, dim * math.log(radius) if radius else math.log(c))
        count = 0.0
        for block in reference.split(BLOCK):
            count += float((prior.whiten(block, dim).norm(dim=1) < prior.law.inner).sum())
        prior.inside = count / N
        return prior

    def sample(self, n: int, generator: Generator) -> Tensor:
        z = _normal(n, len(self.mean), generator)
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
        edge = -1e-4
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

        if a > 1:
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

        x = self.first.unwhiten(_normal(n, len(self.joint_gap), generator))
        y = self.second.unwhiten(_normal(n, len(self.joint_gap), generator))
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

    reference: Tensor  # (N, D), as it was given
    points: Tensor  # (N, D) rows, or (N, dim) coordinates fp64, that distances are measured to
    squares: Tensor  # (N,): squared norms of the centred rows; inf for those held out
    held_distances: Tensor  # of the rows held out, which are no neighbours
    threshold: float  # of distances that are sparse
    acceptance: float  # share of wide draws that are sparse

    @classmethod
    def fit(cls, reference: Tensor, k: int = 10, quantile: float = 0.9, scale: float = 1.5,
            dim: int = 0, shrinkage: float = -1.0) -> Sparse:
        import torch

        N, D = reference.shape
        if not (0 < quantile < 1 and scale > 0 and 0 <= dim <= D):
            raise PriorError(f"sparse: quantile {quantile}, scale {scale}, dim {dim}: expected a "
                             f"quantile between 0 and 1, a scale above 0, and a dim of 0 to {D}")
        prior = super().fit(reference, shrinkage)
        held = _evenly_spaced(N, min(max(N // 10, 1), 1000))
        if not 1 <= k <= N - len(held):
            raise PriorError(f"sparse: k is {k}, and {N - len(held)} reference rows can be "
                             "neighbours: give a k of 1 to that, or a larger reference")

        # What distances are measured to. In its full width the reference is not copied: 128k rows
        # of 2048 are a gigabyte.
        prior.reference, prior.k, prior.wide, prior.dim = reference, k, scale, dim
        blocks = reference.split(BLOCK)
        prior.points = torch.cat([prior.centred(x) for x in blocks]) if dim else reference
        prior.squares = torch.cat([prior.centred(x).square().sum(1) for x in blocks])
        prior.squares[held] = math.inf

        # The threshold comes from real rows, the acceptance from wide draws.
        prior.held_distances = prior.distance(reference[held])
        prior.threshold = float(prior.held_distances.quantile(quantile))
        if not prior.threshold > 1e-6 * prior.scale[0]:
            raise PriorError(f"sparse: {quantile:.0%} of the reference rows have {k} or more "
                             "copies: raise k or quantile, or give a reference without copies")
        wide_draws = prior._wide_draws(1000, torch.Generator().manual_seed(0))
        prior.acceptance = float((prior.distance(wide_draws) > prior.threshold).double().mean())
        return prior

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
        nearest = q.new_empty(len(q), 0, dtype=dtype)
        neighbours = torch.zeros(len(q), 0).long()
        for start in range(0, len(self.points), BLOCK):
            block = self.points[start : start + BLOCK].to(dtype)
            squares = self.squares[start : start + BLOCK].to(dtype)
            # |p - q|^2, up to a term that all p share
            scores = squares - 2 * q.detach().to(dtype) @ block.T
            indices = torch.arange(start, start + len(block)).expand_as(scores)

            # Keep the k nearest of the earlier blocks and this one.
            candidates = torch.cat((neighbours, indices), 1)
            nearest, columns = torch.cat((nearest, scores), 1).topk(
                min(self.k, candidates.shape[1]), largest=False)
            neighbours = candidates.gather(1, columns)

        # The distance itself is computed anew, without cancellation and with its gradient.
        kth_neighbour = self.centred(self.reference[neighbours[:, self.k - 1]])
        return (q - kth_neighbour).norm(dim=1)

    def _wide_draws(self, n: int, generator: Generator) -> Tensor:
        return self.unwhiten(self.wide * _normal(n, len(self.mean), generator))

    def draw(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """-> rows (n, D) fp64, and which of them (n,) were moved."""
        import torch

        rows = self.mean.new_empty(n, len(self.mean))
        moved = torch.zeros(n).bool()
        dense = torch.arange(n)
        tries = 0
        while len(dense):
            if tries < 50:
                rows[dense] = self._wide_draws(len(dense), generator)
            else:
                rows[dense] = self.mean + 1.1 * (rows[dense] - self.mean)
                moved[dense] = True
            dense = dense[self.distance(rows[dense]) <= self.threshold]
            tries += 1
        return rows, moved

    def sample(self, n: int, generator: Generator) -> Tensor:
        rows, _ = self.draw(n, generator)
        return rows.float()

    def log_prob(self, x: Tensor) -> Tensor:
        """The wide density over its acceptance (that of 1000 draws of a fixed seed) where the
        reference is thin, moved rows apart. Elsewhere the true density is 0; log_prob is a slope in
        the distance to the k-th neighbour there, so steep that MAP keeps rows outside. A row deep
        inside may come to rest in a gap between neighbours."""
        D = x.shape[1]
        log_wide = self._log_normal(self.whiten(x) / self.wide) - D * math.log(self.wide)
        depth = (self.distance(x) / self.threshold - 1).clamp(max=0)
        return (log_wide - math.log(max(self.acceptance, 1e-3)) + 1e4 * depth).to(x.dtype)

    def report(self) -> dict[str, float]:
        """Distances to the k-th neighbour: the threshold, medians of the real rows and of 200 draws
        of a fixed seed, and the share of those draws that were moved."""
        import torch

        rows, moved = self.draw(200, torch.Generator().manual_seed(1))
        return {**super().report(), "acceptance": self.acceptance, "threshold": self.threshold,
                "distance_reference": float(self.held_distances.median()),
                "distance_drawn": float(self.distance(rows).median()),
                "moved": float(moved.double().mean())}


class VAE(Fitted):
    """Draws of a variational autoencoder of the reference (paper 4.6) that does not collapse: the
    decoder's noise is learned and drawn, every latent dimension keeps free_bits nats, latents start
    from encoded reference rows, and the draws' mean and covariance are set to those of fitted.

    It works on the whitened coordinates u of the fitted Gaussian. Encoder q(z | u) and decoder
    p(y | z) are diagonal Gaussians, see _autoencoder. y is u in rotated axes: twice during training
    u is rotated to axes in which what the decoder misses is uncorrelated, because noise that is
    independent in other axes loses correlations. After training a linear map corrects what is left
    of the difference in covariance. All is drawn from a fixed seed. A reference of fewer than 2000
    rows has fewer training steps.

    log_prob is a lower bound of the log density of the draws, importance-weighted (Burda et al.
    2016): log 1/S sum_s p(y | z_s) q_agg(z_s) / q(z_s | u), with q_agg the mixture of the encoded
    rows that draws start from (4096 at most). The noises of z_s are the same in every call, and the
    bound holds on average over them."""

    @classmethod
    def fit(cls, reference: Tensor, latent: int = 32, hidden: int = 256, steps: int = 1000,
            free_bits: float = 0.1, shrinkage: float = -1.0) -> VAE:
        import torch

        N, D = reference.shape
        if N < 20:
            raise PriorError(f"vae: {N} reference rows are too few: give 20 or more, or use fitted")
        if min(latent, hidden, steps) < 1 or free_bits < 0:
            raise PriorError(f"vae: latent {latent}, hidden {hidden}, steps {steps}, free_bits "
                             f"{free_bits}: expected 1 or more, and free_bits 0 or more")
        prior = super().fit(reference, shrinkage)
        rows = reference[_evenly_spaced(N, 32768)]
        u = torch.cat([prior.whiten(block).float() for block in rows.split(4096)])

        # Few rows have few steps: the network would learn them by heart.
        steps = min(steps, max(200, N // 2))
        generator = torch.Generator().manual_seed(0)
        prior.network = _autoencoder(D, latent, hidden, generator)
        axes = prior._train(u, steps, free_bits, generator)
        prior.network.requires_grad_(False)
        prior._match_moments(u, axes, generator)
        prior._encode_starts(u, generator)

        # From here on the network is in fp64, and its encoder takes u in its own axes.
        prior.network.double()
        _rotate_input(prior.network, axes.T)
        return prior

    def _train(self, u: Tensor, steps: int, free_bits: float, generator: Generator) -> Tensor:
        """Train the network on whitened rows u (M, D) fp32, which are rotated in place, to
        u @ axes. -> axes (D, D) fp64."""
        import torch

        network = self.network
        axes = torch.eye(u.shape[1])
        for start, end in pairwise((0, steps // 5, steps // 2, steps)):
            # Rotate before the second and the third stage; a rotated network needs a new optimiser.
            if start:
                axes = axes @ _rotate(network, u, generator)
            optimiser = torch.optim.Adam(network.parameters())
            for step in range(start, end):
                optimiser.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
                x = u[torch.randint(len(u), (128,), generator=generator)]

                # The evidence bound, but no dimension of z is rewarded for less than free_bits.
                z, kl = network.draw_latents(x, generator)
                mean, log_variance = network.decode(z)
                error = (x - mean).square() * (-log_variance).exp()
                reconstruction = 0.5 * (error + log_variance).sum(1).mean()
                loss = reconstruction + kl.mean(0).clamp(min=free_bits).sum()

                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return axes.double()

    def _match_moments(self, u: Tensor, axes: Tensor, generator: Generator) -> None:
        """Set the linear map that gives draws the mean and covariance of the fitted Gaussian:
        y = u @ into + centre, u = (y - centre) @ back. log_det is log |det into|.

        u (M, D): the training rows, rotated by axes (D, D)."""
        import torch

        # The moments of the network's draws: of the decoder's means, and of its noise.
        N = len(u)
        centre, second, noise, kl = 0.0, 0.0, 0.0, 0.0
        for x in u.split(4096):
            z, nats = self.network.draw_latents(x, generator)
            mean, log_variance = self.network.decode(z)
            centre = centre + mean.double().sum(0) / N
            second = second + (mean.T @ mean / N).double()
            noise = noise + log_variance.double().exp().sum(0) / N
            kl = kl + nats.sum(0) / N
        explained = second - centre.outer(centre)

        # back is the symmetric square root of the inverse covariance, and undoes the rotation.
        variance, basis = torch.linalg.eigh(explained + noise.diag())
        self.centre = centre
        self.into = axes @ (basis * variance.sqrt() @ basis.T)
        self.back = (basis / variance.sqrt() @ basis.T) @ axes.T
        self.log_det = variance.log().sum() / 2

        # What report() gives: shares of the variance of u, and nats of each latent dimension.
        self.kl = kl
        total = u.square().sum() / N
        self.explained = explained.trace() / total
        self.variance = variance.sum() / total

    def _encode_starts(self, u: Tensor, generator: Generator) -> None:
        """Encode the rows that draws start from, of the rotated rows u (M, D), and draw the noises
        of log_prob."""
        import torch

        codes, log_variances = self.network.encode(u[_evenly_spaced(len(u), 4096)])
        self.codes = codes.double()
        self.code_log_variances = log_variances.double()
        latent = codes.shape[1]
        noises = torch.randn(4, 1, latent, generator=generator).double()
        self.noises = torch.cat((noises, -noises))  # (S, 1, latent), in pairs of opposite sign

    def sample(self, n: int, generator: Generator) -> Tensor:
        import torch

        # z from the encoding of a reference row, y from the decoder
        start = torch.randint(len(self.codes), (n,), generator=generator)
        z_deviation = (self.code_log_variances[start] / 2).exp()
        z = self.codes[start] + _normal(n, self.codes.shape[1], generator) * z_deviation
        mean, log_variance = self.network.decode(z)
        y = mean + _normal(n, mean.shape[1], generator) * (log_variance / 2).exp()
        return self.unwhiten((y - self.centre) @ self.back).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """A lower bound, see the class."""
        import torch

        if len(x) > 64:  # a block's matrix below is (S n, 4096)
            return torch.cat([self.log_prob(block) for block in x.split(64)])
        u = self.whiten(x)
        S = len(self.noises)

        # z_s and log q(z_s | u). All laws of z lack (2 pi)^(-latent / 2), which cancels.
        mean, log_variance = self.network.encode(u)
        z = (mean + self.noises * (log_variance / 2).exp()).flatten(0, 1)  # (S n, latent)
        log_q = -0.5 * (self.noises.square() + log_variance).sum(2).flatten()

        # log p(y | z_s)
        y = (u @ self.into + self.centre).repeat(S, 1)  # (S n, D)
        mean, log_variance = self.network.decode(z)
        error = (y - mean).square() * (-log_variance).exp()
        log_p = -0.5 * (error + log_variance + math.log(2 * math.pi)).sum(1)

        # log q_agg(z_s): the squares are multiplied out, so that no (S n, 4096, latent) is made
        precision = (-self.code_log_variances).exp()
        distances = (z.square() @ precision.T - 2 * z @ (self.codes * precision).T
                     + (self.codes.square() * precision + self.code_log_variances).sum(1))
        log_agg = torch.logsumexp(-0.5 * distances, 1) - math.log(len(self.codes))

        log_weights = (log_p + log_agg - log_q).view(S, -1)
        bound = torch.logsumexp(log_weights, 0) - math.log(S)
        return (bound + self.log_det - self.scale.log().sum()).to(x.dtype)

    def report(self) -> dict[str, float | list[float]]:
        """Active latent dimensions (their means vary by more than 0.01, Burda et al. 2016), nats
        of each; as shares of u's variance, what they tell, and raw draws (1: no collapse)."""
        active = (self.codes.var(0) > 0.01).sum()
        return {**super().report(), "latent": float(len(self.kl)), "active_units": float(active),
                "kl_mean": float(self.kl.mean()), "kl_max": float(self.kl.max()),
                "told": float(self.explained), "variance": float(self.variance),
                "kl": self.kl.sort(descending=True).values.tolist()}


def _autoencoder(width: int, latent: int, hidden: int, generator: Generator):
    """The VAE's network. Its class is made in here because this module imports torch only inside
    functions."""
    import torch
    from torch import nn
    from torch.nn.functional import gelu

    class Autoencoder(nn.Module):
        """Encoder q(z | u) and decoder p(y | z), diagonal Gaussians with one hidden layer each.
        Log variances are bounded: the encoder's to -6 .. 0, the decoder's to -4 .. 4."""

        def __init__(self):
            super().__init__()
            # The layers are initialised below: nn.Linear would take the global generator.
            linear = functools.partial(nn.utils.skip_init, nn.Linear)
            self.encoder_hidden = linear(width, hidden)
            self.encoder_out = linear(hidden, 2 * latent)
            self.decoder_hidden = linear(latent, hidden)
            self.decoder_mean = linear(hidden, width, bias=False)
            self.decoder_skip = linear(latent, width)  # the mean's linear part and its bias
            self.decoder_spread = linear(hidden, width)

        def encode(self, u: Tensor) -> tuple[Tensor, Tensor]:
            """u (n, D) -> mean and log variance of q(z | u), (n, latent) each."""
            # Outliers are scaled down, so that they do not dominate what the encoder learns.
            u = u * (1 + u.square().mean(1, keepdim=True)).rsqrt()
            mean, spread = self.encoder_out(gelu(self.encoder_hidden(u))).chunk(2, 1)
            return mean, -6 * spread.sigmoid()

        def draw_latents(self, u: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
            """A draw z of q(z | u), and KL(q || N(0, I)) in nats, (n, latent) each."""
            mean, log_variance = self.encode(u)
            noise = torch.randn(mean.shape, generator=generator)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
            return mean + noise * (log_variance / 2).exp(), kl

        def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
            """z (n, latent) -> mean and log variance of p(y | z), (n, D) each."""
            h = gelu(self.decoder_hidden(z))
            mean = self.decoder_mean(h) + self.decoder_skip(z)
            return mean, 4 * (self.decoder_spread(h) / 4).tanh()

    network = Autoencoder()
    outputs = ("decoder_mean", "decoder_skip", "decoder_spread")  # small, for a start at N(0, I)
    for name, layer in network.named_children():
        _draw_weight(layer, 0.1 if name in outputs else 1.0, generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
            # This draw is dropped. Without it the weights after it would not be those of old runs.
            torch.randn(1, layer.out_features, generator=generator)
    return network


def _draw_weight(layer, gain: float, generator: Generator) -> None:
    """Draw a linear layer's weight from N(0, gain^2 / inputs)."""
    import torch

    noise = torch.randn(layer.in_features, layer.out_features, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(noise.T * (gain / math.sqrt(layer.in_features)))


def _rotate(network, u: Tensor, generator: Generator) -> Tensor:
    """Rotate u (M, D) in place, and the network with it, to axes in which the decoder's errors are
    uncorrelated. The layer of their variances starts anew. -> rotation (D, D) fp32."""
    import torch

    with torch.no_grad():
        # The axes are the eigenvectors of the errors' second moments.
        covariance = torch.zeros(u.shape[1], u.shape[1], dtype=torch.float64)
        for x in u.split(4096):
            z, _ = network.draw_latents(x, generator)
            mean, _ = network.decode(z)
            error = x - mean
            covariance += (error.T @ error / len(u)).double()
        variance, basis = torch.linalg.eigh(covariance)
        rotation = basis.float()

        # Rotate what reads u and what writes its mean. A diagonal variance has no such rotation.
        _rotate_input(network, rotation)
        for layer in (network.decoder_mean, network.decoder_skip):
            layer.weight.copy_(rotation.T @ layer.weight)
        network.decoder_skip.bias.copy_(network.decoder_skip.bias @ rotation)
        _draw_weight(network.decoder_spread, 0.1, generator)
        network.decoder_spread.bias.copy_(variance.clamp(min=1e-6).log().float())
        for x in u.split(4096):
            x.copy_(x @ rotation)
    return rotation


def _rotate_input(network, rotation: Tensor) -> None:
    """Change the encoder so that it gives for u @ rotation what it gave for u."""
    weight = network.encoder_hidden.weight  # (hidden, D)
    weight.copy_(weight @ rotation)


class Posterior(Fitted):
    """What earlier runs learned, as the prior of the next task (posterior:RUN,RUN,...): the
    Gaussian of all their final rows. resample=1 takes the rows themselves, row j from row j of a
    run picked at random, so that one run alone is a warm start.

    The use that the paper names for trained prompts (paper 5). log_prob is the Gaussian's also with
    resample=1: MAP holds rows near where earlier prompts ended."""

    several, sources = True, True

    runs: list[Tensor]  # (n, D) each, to resample; [] to draw from the Gaussian

    @classmethod
    def fit(cls, *runs: Tensor, resample: int = 0, shrinkage: float = -1.0) -> Posterior:
        import torch

        if resample not in (0, 1):
            raise PriorError(f"posterior: resample is {resample}, expected 0, or 1 for rows")
        prior = super().fit(torch.cat(runs), shrinkage)
        prior.runs = [rows.float() for rows in runs] if resample else []
        return prior

    def sample(self, n: int, generator: Generator) -> Tensor:
        import torch

        if not self.runs:
            return super().sample(n, generator)
        chosen = torch.randint(len(self.runs), (n,), generator=generator).tolist()
        drawn = []
        for j, run in enumerate(chosen):
            rows = self.runs[run]
            drawn.append(rows[j % len(rows)])
        return torch.stack(drawn)


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
# torch is imported inside the functions that need it, so that this table is read without it.
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
    """A prior's options and their defaults, from the signature of its fit."""
    parameters = inspect.signature(PRIORS[name].fit).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


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


def _option(name: str, key: str, text: str) -> object:
    """The value of an option, in the type of its default."""
    known = options(name)
    if key not in known:
        raise PriorError(f"prior {name!r} has no option {key!r}: it has "
                         f"{', '.join(known) or 'none'}")
    type_ = type(known[key])
    try:
        value = type_(text)
        if type_ in (int, float) and not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise PriorError(f"prior {name}: {key}={text!r} is not a finite "
                         f"{type_.__name__}") from None
    return value
