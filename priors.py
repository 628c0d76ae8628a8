"""Priors over the rows of a prompt, each fitted on a reference population. Needs torch.

A reference is any set of vectors (N, D) that live where the rows will: the vocabulary, the token
embeddings as a data set uses them, or the activations at the input of a deep layer. A prior is
fitted once and then draws rows and judges them:

    prior = PRIORS["exclusion"].fit(embeddings, c=5.0)
    rows = prior.sample(20, torch.Generator().manual_seed(0))  # (20, D) fp32, by the seed alone
    prior.log_prob(rows)                                       # (20,) nats; minus this: MAP penalty

Fits are in fp64, densities in log space. This module knows nothing of models or data. torch is
imported where it is used, so that the registry can be read without it.

N reference rows, D width, n prompt rows. `paper` is Exploring Embedding Priors in Prompt-Tuning
(arXiv 2412.18582).
"""

from __future__ import annotations

import inspect
import math


class PriorError(ValueError):
    """A prior that cannot be fitted or do what is asked: what, and the remedy, in one line."""


class Isotropic:
    """N(0, std^2 I), whatever the reference (paper 3.3)."""

    has_density = True

    def __init__(self, width: int, std: float):
        self.width, self.std = width, std

    @classmethod
    def fit(cls, reference, std: float = 0.02):
        if not std > 0:
            raise PriorError(f"isotropic: std is {std}, expected a positive number")
        return cls(reference.shape[1], std)

    def sample(self, n: int, generator):
        return self.std * _normal(n, self.width, generator).float()

    def log_prob(self, x):
        D = x.shape[1]
        return (-0.5 * (x / self.std).square().sum(1)
                - D * math.log(self.std * math.sqrt(2 * math.pi)))

    def report(self) -> dict[str, float]:
        return {"std": self.std}


class Xavier:
    """Uniform in +-sqrt(6 / (n + D)), Xavier's rule for the (n, D) matrix of rows (paper 4.2).
    Flat: no use for MAP."""

    has_density = False

    def __init__(self, width: int):
        self.width = width

    @classmethod
    def fit(cls, reference):
        return cls(reference.shape[1])

    def bound(self, n: int) -> float:
        return math.sqrt(6 / (n + self.width))

    def sample(self, n: int, generator):
        import torch

        return (2 * torch.rand(n, self.width, generator=generator, dtype=torch.float64) - 1
                ).float() * self.bound(n)

    def log_prob(self, x):
        """x (n, D): the bound depends on n."""
        a = self.bound(x.shape[0])
        inside = (x.abs() <= a).all(1)
        return x.new_full((x.shape[0],), -x.shape[1] * math.log(2 * a)
                          ).masked_fill(~inside, -math.inf)

    def report(self) -> dict[str, float]:
        return {}


class Vocab:
    """Rows of the reference itself, drawn without replacement: real tokens, or real activations.
    Discrete."""

    has_density = False

    def __init__(self, reference):
        self.reference = reference

    @classmethod
    def fit(cls, reference):
        return cls(reference.float())

    def sample(self, n: int, generator):
        import torch

        N = len(self.reference)
        if n > N:
            raise PriorError(f"vocab: {n} rows wanted and the reference has {N}: ask for fewer, "
                             "or give a larger one")
        return self.reference[torch.randperm(N, generator=generator)[:n]].clone()

    def log_prob(self, x):
        """log of a row's share of the reference, -inf for anything that is not in it."""
        count = x.new_tensor([(self.reference == row).all(1).sum() for row in x])
        return count.log() - math.log(len(self.reference))

    def report(self) -> dict[str, float]:
        return {}


class Text(Vocab):
    """The rows of a text (--text), in order, repeated or cut to length. The reference is
    the text's own tokens."""

    def sample(self, n: int, generator=None):
        N = len(self.reference)
        return self.reference.repeat(-(-n // N), 1)[:n].clone()


class Fitted:
    """N(mu, Sigma), mean and covariance of the reference (paper 3.3, "structured").

    shrinkage is the weight of the identity (trace Sigma / D) I mixed into Sigma; -1 takes the
    Ledoit-Wolf optimum, which is what makes N < D usable and vanishes for N >> D."""

    has_density = True

    def __init__(self, mean, basis, scale, shrinkage: float):
        self.mean, self.basis, self.scale, self.shrinkage = mean, basis, scale, shrinkage
        # mean (D,), basis (D, D) columns by falling variance, scale (D,) standard deviations; fp64

    @classmethod
    def fit(cls, reference, shrinkage: float = -1.0):
        return cls(*cls._gaussian(reference, shrinkage))

    @staticmethod
    def _gaussian(reference, shrinkage: float):
        import torch

        N, D = reference.shape
        if N < 2:
            raise PriorError(f"a Gaussian cannot be fitted on {N} reference rows: "
                             "give a larger reference")
        if shrinkage > 1:
            raise PriorError(f"shrinkage is {shrinkage}, expected 0 to 1, or -1 for the "
                             "Ledoit-Wolf optimum")
        mean = reference.mean(0, dtype=torch.float64)
        if not torch.isfinite(mean).all():
            raise PriorError("the reference has values that are not finite: find the rows and "
                             "leave them out")
        covariance, fourth = torch.zeros(D, D, dtype=torch.float64, device=reference.device), 0.0
        for block in reference.split(8192):  # all of a 128k vocabulary in fp64 would be gigabytes
            x = block.double() - mean
            covariance += x.T @ x / N
            fourth += x.square().sum(1).square().sum() / N
        trace, square = covariance.trace(), covariance.square().sum()
        if not trace > 0:
            raise PriorError("all reference rows are equal, so there is no spread to fit: "
                             "give another reference")
        if shrinkage < 0:  # Ledoit and Wolf 2004, lemmas 3.2 to 3.4
            spread = square - trace**2 / D
            shrinkage = float(((fourth - square) / N / spread).clamp(0, 1)) if spread > 0 else 1.0
        variance, basis = torch.linalg.eigh(covariance)
        variance, basis = variance.flip(0), basis.flip(1)
        variance = (1 - shrinkage) * variance + shrinkage * trace / D
        # A singular Sigma without shrinkage has zero variances; the floor keeps densities finite.
        return mean, basis, variance.clamp(min=1e-10 * variance[0]).sqrt(), shrinkage

    def whiten(self, x):
        """(n, D) -> coordinates (n, D) fp64 in which the fitted Gaussian is N(0, I)."""
        return (x.double() - self.mean) @ self.basis / self.scale

    def sample(self, n: int, generator):
        z = _normal(n, len(self.mean), generator)
        return (self.mean + z * self.scale @ self.basis.T).float()

    def log_prob(self, x):
        return self._log_normal(self.whiten(x)).to(x.dtype)

    def _log_normal(self, z):
        """Density of rows given their whitened coordinates z (n, D)."""
        return (-0.5 * z.square().sum(1) - self.scale.log().sum()
                - 0.5 * z.shape[1] * math.log(2 * math.pi))

    def report(self) -> dict[str, float]:
        return {"shrinkage": self.shrinkage}


class Exclusion(Fitted):
    """Outside the dense core: draws of N(mu, c_dim Sigma), c_dim = exp((2 / dim) log c), kept with
    probability max(0, 1 - pdf / pdf_wide) (paper 3.3). Exact, with no rejection.

    At the width of a model this hardly moves a draw (dim 2048: radius 45.25 to 46.16), so k > 0
    excludes in the first k principal directions alone and leaves the fitted Gaussian in the others.

    The kept density is (pdf_wide - pdf) / Z outside the radius r0 where the two are equal. It
    depends on the Mahalanobis radius alone, so the radius is drawn from its one-dimensional law by
    inverting F(r) = [G(r^2 / c_dim) - G(r0^2 / c_dim) - G(r^2) + G(r0^2)] / Z with G the chi-square
    law of dim degrees, and the direction uniformly."""

    @classmethod
    def fit(cls, reference, c: float = 5.0, k: int = 0, shrinkage: float = -1.0):
        D = reference.shape[1]
        if not c > 1:
            raise PriorError(f"exclusion: c is {c}, expected more than 1")
        if not 0 <= k <= D:
            raise PriorError(f"exclusion: k is {k}, expected 1 to {D} principal directions, "
                             "or 0 for all")
        prior = super().fit(reference, shrinkage)
        prior.c, prior.dim = c, k or D
        return prior

    @property
    def c_dim(self) -> float:
        return math.exp(2 / self.dim * math.log(self.c))

    @property
    def inner(self) -> float:
        """r0, within which nothing is drawn."""
        return math.sqrt(2 * math.log(self.c) / (1 - 1 / self.c_dim))

    @property
    def acceptance(self) -> float:
        """Z, the share of wide draws that the paper's rejection would keep."""
        return self._chi2(self.inner**2) - self._chi2(self.inner**2 / self.c_dim)

    def _chi2(self, square, more: int = 0):
        """The chi-square law of dim + more degrees at a squared radius; a number or a tensor."""
        import torch

        s = torch.as_tensor(square, dtype=torch.float64)
        p = torch.special.gammainc(torch.full_like(s, (self.dim + more) / 2), s / 2)
        return p if torch.is_tensor(square) else float(p)

    def radius_law(self, r):
        """F(r), the law of a draw's Mahalanobis radius in the excluded subspace; r (m,) fp64."""
        r0 = self.inner
        F = (self._chi2(r**2 / self.c_dim) - self._chi2(r0**2 / self.c_dim)
             - self._chi2(r**2) + self._chi2(r0**2)) / self.acceptance
        return F.masked_fill(r <= r0, 0.0).clamp(0, 1)

    def radii(self, n: int, generator):
        import torch

        u = torch.rand(n, generator=generator, dtype=torch.float64)
        low = torch.full_like(u, self.inner)
        # the tail falls like exp(-r^2 / 2 c_dim): 40 widths hold all of it
        high = low + 40 * math.sqrt(self.c_dim)
        for _ in range(60):  # bisection to the last bit of a double
            middle = (low + high) / 2
            below = self.radius_law(middle) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def sample(self, n: int, generator):
        z = _normal(n, len(self.mean), generator)
        core = z[:, : self.dim]
        z[:, : self.dim] = core / core.norm(dim=1, keepdim=True) * self.radii(n, generator)[:, None]
        return (self.mean + z * self.scale @ self.basis.T).float()

    def log_prob(self, x):
        """Exact outside the excluded radius, but for a sliver at its edge. Inside, where the true
        density is 0, it goes on as a steep slope, so that MAP pushes a row that strays inside out
        again instead of stopping on an infinite loss."""
        import torch

        z = self.whiten(x)
        square = z[:, : self.dim].square().sum(1)
        # log(pdf / pdf_wide), negative outside; from near 0 up the tangent of log(1 - e^u) goes on
        u = math.log(self.c) - square / 2 * (1 - 1 / self.c_dim)
        edge = -1e-4
        at = u.clamp(max=edge)
        log_kept = torch.log(-torch.expm1(at)) + (u - at) * (math.exp(edge) / math.expm1(edge))
        log_wide = self._log_normal(z) + square / 2 * (1 - 1 / self.c_dim) - math.log(self.c)
        return (log_wide + log_kept - math.log(self.acceptance)).to(x.dtype)

    def report(self) -> dict[str, float]:
        """The radius shift: mean radius of the fitted Gaussian and of the draws, and r0."""
        d, r0 = self.dim, self.inner
        mean = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))  # chi law's
        # E[r; r > r0] = mean * P(chi of d + 1 degrees > r0)
        outside = lambda s: 1 - self._chi2(s, more=1)
        moved = mean * (math.sqrt(self.c_dim) * outside(r0**2 / self.c_dim)
                        - outside(r0**2)) / self.acceptance
        return {**super().report(), "dim": float(d), "c_dim": self.c_dim,
                "acceptance": self.acceptance, "radius_excluded": r0, "radius_fitted": mean,
                "radius_drawn": moved}


def _normal(n: int, width: int, generator):
    import torch

    return torch.randn(n, width, generator=generator, dtype=torch.float64)


PRIORS = {"isotropic": Isotropic, "xavier": Xavier, "vocab": Vocab, "text": Text, "fitted": Fitted,
          "exclusion": Exclusion}


def options(name: str) -> dict[str, object]:
    """A prior's options and their defaults, from its fit."""
    parameters = inspect.signature(PRIORS[name].fit).parameters
    return {p.name: p.default for p in parameters.values() if p.default is not p.empty}


def parse(spec: str) -> tuple[str, dict[str, object]]:
    """"exclusion:c=10,k=16" -> ("exclusion", {"c": 10.0, "k": 16})."""
    name, _, rest = spec.partition(":")
    if name not in PRIORS:
        raise PriorError(f"prior {name!r} is not known: use one of {', '.join(PRIORS)}")
    known, given = options(name), {}
    for part in filter(None, rest.split(",")):
        key, _, text = part.partition("=")
        if key not in known:
            raise PriorError(f"prior {name!r} has no option {key!r}: it has "
                             f"{', '.join(known) or 'none'}")
        try:
            given[key] = type(known[key])(text)
            if not math.isfinite(given[key]):
                raise ValueError
        except ValueError:
            raise PriorError(f"prior {name}: {key}={text!r} is not a finite "
                             f"{type(known[key]).__name__}") from None
    return name, given
