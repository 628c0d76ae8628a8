"""Priors over the rows of a prompt, each fitted on a reference population. Needs torch.

A reference is any set of vectors (N, D) that live where the rows will: the vocabulary, the token
embeddings as a data set uses them, or the activations at the input of a deep layer. A prior is
fitted once and then draws rows and judges them:

    prior = PRIORS["exclusion"].fit(embeddings, c=5.0)
    rows = prior.sample(20, torch.Generator().manual_seed(0))  # (20, D) fp32, by the seed alone
    prior.log_prob(rows)                                       # (20,) nats; minus this: MAP penalty

Fits are in fp64 (a network's weights in fp32), densities in log space. This module knows nothing of
models or data. torch is imported where it is used, so that the registry can be read without it.

N reference rows, D width, n prompt rows. `paper` is Exploring Embedding Priors in Prompt-Tuning
(arXiv 2412.18582).
"""

from __future__ import annotations

import inspect
import math


class PriorError(ValueError):
    """A prior that cannot be fitted or do what is asked: what, and the remedy, in one line."""


class Prior:
    """What all have: fit(reference (N, D), **options), a class method; sample(n, generator) ->
    (n, D) fp32; log_prob(x (n, D)) -> (n,) nats; report() -> figures that say how it went."""

    has_density = False  # log_prob has a slope that MAP can follow
    several = False  # fit takes its references apart: fit(first, second, ...)
    sources = False  # its references are finished runs, named in the spec

    def report(self) -> dict[str, float]:
        return {}


class Isotropic(Prior):
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


class Xavier(Prior):
    """Uniform in +-sqrt(6 / (n + D)), Xavier's rule for the (n, D) matrix of rows (paper 4.2).
    Flat: no use for MAP."""

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


class Vocab(Prior):
    """Rows of the reference itself, drawn without replacement: real tokens, or real activations.
    Discrete."""

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


class Text(Vocab):
    """The rows of a text (--text), in order, repeated or cut to length. The reference is
    the text's own tokens."""

    def sample(self, n: int, generator=None):
        N = len(self.reference)
        return self.reference.repeat(-(-n // N), 1)[:n].clone()


class Fitted(Prior):
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

    def whiten(self, x, k: int | None = None):
        """(n, D) -> coordinates fp64 (all, or k) in which the fitted Gaussian is N(0, I)."""
        return (x.double() - self.mean) @ self.basis[:, :k] / self.scale[:k]

    def place(self, z):
        """The way back: whitened coordinates (n, D) -> rows (n, D) fp64."""
        return self.mean + z * self.scale @ self.basis.T

    def sample(self, n: int, generator):
        return self.place(_normal(n, len(self.mean), generator)).float()

    def log_prob(self, x):
        return self._log_normal(self.whiten(x)).to(x.dtype)

    def _log_normal(self, z):
        """Density of rows given their whitened coordinates z (n, D)."""
        return (-0.5 * z.square().sum(1) - self.scale.log().sum()
                - 0.5 * z.shape[1] * math.log(2 * math.pi))

    def report(self) -> dict[str, float]:
        return {"shrinkage": self.shrinkage}


class Exclusion(Fitted):
    """Outside the dense core: draws of N(mu, c_dim Sigma), c_dim = exp((2 / dim) log c), or
    radius^2 if radius is given, kept with probability max(0, 1 - pdf / pdf_wide) (paper 3.3).
    Exact, with no rejection. k > 0: in the first k principal directions alone.

    At the width of a model c = 5 hardly moves a draw (dim 2048: mean radius 45.25 to 46.16). k > 0
    does, and leaves the fitted Gaussian in the other directions. So does radius, at any width: at
    1.5 and dim 2048 most of the reference lies within r0 (54.7), and draws at 67.9.

    The kept density is (pdf_wide - pdf) / Z outside the radius r0 where the two are equal. It
    depends on the Mahalanobis radius alone, so the radius is drawn from its one-dimensional law by
    inverting F(r) = [G(r^2 / c_dim) - G(r0^2 / c_dim) - G(r^2) + G(r0^2)] / Z with G the chi-square
    law of dim degrees, and the direction uniformly."""

    @classmethod
    def fit(cls, reference, c: float = 5.0, k: int = 0, radius: float = 0.0,
            shrinkage: float = -1.0):
        D = reference.shape[1]
        if radius and (c != 5.0 or not radius > 1):
            raise PriorError(f"exclusion: radius is {radius} and c is {c}, expected a radius of "
                             "more than 1 and no c, or no radius")
        if not c > 1:
            raise PriorError(f"exclusion: c is {c}, expected more than 1")
        if not 0 <= k <= D:
            raise PriorError(f"exclusion: k is {k}, expected 1 to {D} principal directions, "
                             "or 0 for all")
        prior = super().fit(reference, shrinkage)
        prior.dim = k or D
        prior.log_c = prior.dim * math.log(radius) if radius else math.log(c)  # c would overflow
        prior.inside = sum(float((prior.whiten(x, prior.dim).norm(dim=1) < prior.inner).sum())
                           for x in reference.split(8192)) / len(reference)
        return prior

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
        # a draw is sqrt(c_dim) times a chi variable, which never passes sqrt(dim) + 40
        high = torch.full_like(u, math.sqrt(self.c_dim) * (math.sqrt(self.dim) + 40))
        for _ in range(60):  # bisection to the last bit of a double
            middle = (low + high) / 2
            below = self.radius_law(middle) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def sample(self, n: int, generator):
        z = _normal(n, len(self.mean), generator)
        core = z[:, : self.dim]
        z[:, : self.dim] = core / core.norm(dim=1, keepdim=True) * self.radii(n, generator)[:, None]
        return self.place(z).float()

    def log_prob(self, x):
        """Exact outside the excluded radius, but for a sliver at its edge. Inside, where the true
        density is 0, it goes on as a steep slope, so that MAP pushes a row that strays inside out
        again instead of stopping on an infinite loss."""
        import torch

        z = self.whiten(x)
        square = z[:, : self.dim].square().sum(1)
        # log(pdf / pdf_wide), negative outside; from near 0 up the tangent of log(1 - e^u) goes on
        u = self.log_c - square / 2 * (1 - 1 / self.c_dim)
        edge = -1e-4
        at = u.clamp(max=edge)
        log_kept = torch.log(-torch.expm1(at)) + (u - at) * (math.exp(edge) / math.expm1(edge))
        log_wide = self._log_normal(z) - u
        return (log_wide + log_kept - math.log(self.acceptance)).to(x.dtype)

    def report(self) -> dict[str, float]:
        """The radius shift: mean radius of the fitted Gaussian and of the draws, r0, and the share
        of the reference that lies within r0."""
        d, r0 = self.dim, self.inner
        mean = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))  # chi law's
        # E[r; r > r0] = mean * P(chi of d + 1 degrees > r0)
        outside = lambda s: 1 - self._chi2(s, more=1)
        moved = mean * (math.sqrt(self.c_dim) * outside(r0**2 / self.c_dim)
                        - outside(r0**2)) / self.acceptance
        return {**super().report(), "dim": float(d), "c_dim": self.c_dim,
                "acceptance": self.acceptance, "radius_excluded": r0, "radius_fitted": mean,
                "radius_drawn": moved, "reference_inside": self.inside}


class Interpolation(Prior):
    """A bridge between two references: a x + (1 - a) y of two draws, one from the Gaussian fitted
    on each, with a uniform in [0, 1] for every row (paper 3.3), or fixed (a=0.5 is the published
    code: a blob half-way).

    Given a, a row is N(a mu1 + (1 - a) mu2, a^2 S1 + (1 - a)^2 S2). One linear map makes S1 + S2
    the identity and both diagonal, p and 1 - p, so that a density costs products alone. log_prob
    sums over a by the trapezoid rule in s = log(a / (1 - a)), as a row tells a near 0 or 1 to a
    relative precision. On a peak of width sigma it errs by exp(-2 pi^2 sigma^2 / step^2), so steps
    are two thirds of a draw's sigma there, from the Fisher information of s; 8192 steps at most,
    which is too few for N < D without shrinkage, where a row tells a to no end."""

    has_density, several = True, True

    @classmethod
    def fit(cls, first, second, a: float = -1.0, shrinkage: float = -1.0):
        import torch

        if a > 1:
            raise PriorError(f"interpolation: a is {a}, expected 0 to 1, or -1 to draw it")
        prior = cls()
        prior.first, prior.second = Fitted.fit(first, shrinkage), Fitted.fit(second, shrinkage)
        S1, S2 = (g.basis * g.scale.square() @ g.basis.T for g in (prior.first, prior.second))
        total, basis = torch.linalg.eigh(S1 + S2)
        white = basis / total.sqrt()
        p, turn = torch.linalg.eigh(white.T @ S1 @ white)
        prior.p = p.clamp(1e-10, 1 - 1e-10)
        prior.map, prior.log_det = white @ turn, -total.log().sum() / 2
        prior.apart = (prior.first.mean - prior.second.mean) @ prior.map
        if a < 0:
            prior.integrate(1.5)
        else:
            prior.rule(p.new_tensor([a]), p.new_zeros(1))
        return prior

    def integrate(self, fine: float):
        """The rule for a uniform in [0, 1], with `fine` steps to a draw's sigma."""
        import torch

        s = torch.linspace(-18, 18, 4097, dtype=torch.float64)
        a = s.sigmoid()[:, None]
        v = a**2 * self.p + (1 - a)**2 * (1 - self.p)  # its slope in a: 2 (a + p - 1)
        known = (a - a**2)**2 * (self.apart.square() / v + 2 * ((a + self.p - 1) / v).square())
        rate = fine * (known.sum(1) + 20).sqrt()  # nodes to a unit of s
        place = torch.cat((s.new_zeros(1), torch.cumulative_trapezoid(rate, s)))
        at = place[-1] * torch.linspace(0, 1, min(int(place[-1]), 8192), dtype=torch.float64)
        i = torch.searchsorted(place, at).clamp(1, 4096)
        part = (at - place[i - 1]) / (place[i] - place[i - 1])
        s, rate = (torch.lerp(x[i - 1], x[i], part) for x in (s, rate))
        self.rule(s.sigmoid(), (s.sigmoid() * (-s).sigmoid() / rate).log().log_softmax(0))

    def rule(self, a, log_weight):
        """Nodes a (Q,) and the logarithms of their weights; what densities need of them."""
        self.a, self.log_weight = a, log_weight
        v = a[:, None]**2 * self.p + (1 - a[:, None])**2 * (1 - self.p)  # (Q, D)
        at = a[:, None] * self.apart
        self.square, self.cross = (1 / v).T, (at / v).T
        self.offset = log_weight + self.log_det - 0.5 * (
            at.square() / v + v.log() + math.log(2 * math.pi)).sum(1)

    def sample(self, n: int, generator):
        import torch

        x, y = (g.place(_normal(n, len(g.mean), generator)) for g in (self.first, self.second))
        a = torch.rand(n, 1, generator=generator).double() if len(self.a) > 1 else self.a
        return (a * x + (1 - a) * y).float()

    def log_prob(self, x):
        import torch

        w = (x.double() - self.second.mean) @ self.map  # (n, D)
        log = self.offset - 0.5 * w.square() @ self.square + w @ self.cross  # (n, Q)
        return torch.logsumexp(log, 1).to(x.dtype)

    def report(self) -> dict[str, float]:
        """Distance of the means, the same in standard deviations (Mahalanobis, of the mean
        covariance), and the share of the draws' variance that the line between them makes."""
        weight, gap = self.log_weight.exp(), self.first.mean - self.second.mean
        line = (weight * (self.a - weight @ self.a).square()).sum() * gap.square().sum()
        blobs = sum((weight * share.square()).sum() * g.scale.square().sum()
                    for share, g in ((self.a, self.first), (1 - self.a, self.second)))
        return {"distance": float(gap.norm()), "separation": float(2**0.5 * self.apart.norm()),
                "between": float(line / (line + blobs)), "nodes": float(len(self.a)),
                "shrinkage_first": self.first.shrinkage, "shrinkage_second": self.second.shrinkage}


class Sparse(Fitted):
    """Where the reference is thin (the kNN sampling that the paper names and leaves): draws of
    N(mu, scale^2 Sigma) that are farther from their k-th nearest reference row than a share
    quantile of real rows are. dim > 0: distances in the first dim principal directions alone.

    In the full width of a model nearly every draw is that far from everything, and this is the wide
    Gaussian: report() tells. The real rows are a tenth of the reference, at most 1000, held out of
    the neighbours. A dense draw is drawn again, up to 50 times: rows so kept have exactly the wide
    density cut to the sparse set. What is dense still moves straight away from the mean until it is
    sparse, by tenths of its distance."""

    @classmethod
    def fit(cls, reference, k: int = 10, quantile: float = 0.9, scale: float = 1.5, dim: int = 0,
            shrinkage: float = -1.0):
        import torch

        N, D = reference.shape
        if not (0 < quantile < 1 and scale > 0 and 0 <= dim <= D):
            raise PriorError(f"sparse: quantile {quantile}, scale {scale}, dim {dim}: expected a "
                             f"quantile between 0 and 1, a scale above 0, and a dim of 0 to {D}")
        prior, held = super().fit(reference, shrinkage), _spread(N, min(max(N // 10, 1), 1000))
        if not 1 <= k <= N - len(held):
            raise PriorError(f"sparse: k is {k}, and {N - len(held)} reference rows can be "
                             "neighbours: give a k of 1 to that, or a larger reference")
        prior.reference, prior.k, prior.wide, prior.dim = reference, k, scale, dim
        blocks = reference.split(8192)  # 128k rows of 2048 are a gigabyte: no copy of them
        prior.points = torch.cat([*map(prior.locate, blocks)]) if dim else reference
        prior.squares = torch.cat([prior.locate(x).square().sum(1) for x in blocks])
        prior.squares[held] = math.inf  # nobody's neighbour
        prior.held = prior.distance(reference[held])
        prior.threshold = float(prior.held.quantile(quantile))
        if not prior.threshold > 1e-6 * prior.scale[0]:
            raise PriorError(f"sparse: {quantile:.0%} of the reference rows have {k} or more "
                             "copies: raise k or quantile, or give a reference without copies")
        wide = prior.place(scale * _normal(1000, D, torch.Generator().manual_seed(0)))
        prior.acceptance = float((prior.distance(wide) > prior.threshold).double().mean())
        return prior

    def locate(self, x):
        """x (n, D) -> x less the mean, in the dim directions in which distances are measured."""
        return (x.double() - self.mean) @ self.basis[:, : self.dim] if self.dim else x - self.mean

    def distance(self, x):
        """x (n, D) -> distance (n,) fp64 to the k-th nearest reference row, found by products with
        blocks of rows: in fp64 if dimensions are few, where the squares of near ones cancel."""
        import torch

        q = self.locate(x)
        kind = torch.float64 if q.shape[1] <= 256 else torch.float32
        near, index = q.new_empty(len(q), 0, dtype=kind), torch.zeros(len(q), 0).long()
        for start in range(0, len(self.points), 8192):
            block = self.points[start : start + 8192].to(kind)
            # |p - q|^2 less what all p share
            s = self.squares[start : start + 8192].to(kind) - 2 * q.detach().to(kind) @ block.T
            index = torch.cat((index, torch.arange(start, start + len(block)).expand_as(s)), 1)
            near, place = torch.cat((near, s), 1).topk(min(self.k, index.shape[1]), largest=False)
            index = index.gather(1, place)
        return (q - self.locate(self.reference[index[:, self.k - 1]])).norm(dim=1)

    def draw(self, n: int, generator):
        """-> rows (n, D) fp64, and which of them (n,) were moved."""
        import torch

        D, tries = len(self.mean), 0
        rows, dense, moved = self.mean.new_empty(n, D), torch.arange(n), torch.zeros(n).bool()
        while len(dense):
            if tries < 50:
                rows[dense] = self.place(self.wide * _normal(len(dense), D, generator))
            else:
                rows[dense], moved[dense] = self.mean + 1.1 * (rows[dense] - self.mean), True
            dense, tries = dense[self.distance(rows[dense]) <= self.threshold], tries + 1
        return rows, moved

    def sample(self, n: int, generator):
        return self.draw(n, generator)[0].float()

    def log_prob(self, x):
        """The wide density over its acceptance (that of 1000 draws of a fixed seed) where the
        reference is thin, moved rows apart. Elsewhere the true density is 0 and it goes on as a
        slope in the distance to the k-th neighbour, so steep that MAP keeps rows outside; one
        already deep inside may come to rest in a gap between neighbours."""
        log_wide = self._log_normal(self.whiten(x) / self.wide) - x.shape[1] * math.log(self.wide)
        inside = (self.distance(x) / self.threshold - 1).clamp(max=0)
        return (log_wide - math.log(max(self.acceptance, 1e-3)) + 1e4 * inside).to(x.dtype)

    def report(self) -> dict[str, float]:
        """Distances to the k-th neighbour: the threshold, medians of the real rows and of 200 draws
        of a fixed seed, and the share of those draws that were moved."""
        import torch

        rows, moved = self.draw(200, torch.Generator().manual_seed(1))
        return {**super().report(), "acceptance": self.acceptance, "threshold": self.threshold,
                "distance_reference": float(self.held.median()),
                "distance_drawn": float(self.distance(rows).median()),
                "moved": float(moved.double().mean())}


class VAE(Fitted):
    """Draws of a variational autoencoder of the reference (paper 4.6) that does not collapse: the
    decoder's noise is learned and drawn, every latent dimension keeps free_bits nats, latents start
    from encoded reference rows, and the draws' mean and covariance are set to those of fitted.

    It works on the whitened coordinates u of the fitted Gaussian. Encoder q(z | u) and decoder
    p(y | z) are diagonal Gaussians of bounded variance, one hidden layer each. y is u turned, twice
    while training, to axes in which what the decoder misses is uncorrelated: noise that is diagonal
    in other axes loses correlations. At the end a linear map corrects what covariance is left.
    All from a fixed seed. Fewer than 2000 rows have fewer steps, or it would learn them by heart.

    log_prob is a lower bound of the log density of the draws, importance-weighted (Burda et al.
    2016): log 1/S sum_s p(y | z_s) q_agg(z_s) / q(z_s | u), with q_agg the mixture of the encoded
    rows that draws start from (4096 at most). The noises of z_s are the same in every call, and the
    bound holds on average over them."""

    @classmethod
    def fit(cls, reference, latent: int = 32, hidden: int = 256, steps: int = 1000,
            free_bits: float = 0.1, shrinkage: float = -1.0):
        import torch

        N, D = reference.shape
        if N < 20:
            raise PriorError(f"vae: {N} reference rows are too few: give 20 or more, or use fitted")
        if min(latent, hidden, steps) < 1 or free_bits < 0:
            raise PriorError(f"vae: latent {latent}, hidden {hidden}, steps {steps}, free_bits "
                             f"{free_bits}: expected 1 or more, and free_bits 0 or more")
        prior = super().fit(reference, shrinkage)
        generator = torch.Generator().manual_seed(0)
        noise = lambda *shape: torch.randn(*shape, generator=generator)
        # encoder e1, e2; decoder d1, then mean (and skip, straight from z) and spread
        prior.weights = w = {name: gain / math.sqrt(a) * noise(a, b) for name, a, b, gain in (
            ("e1", D, hidden, 1), ("e1.bias", 1, hidden, 0), ("e2", hidden, 2 * latent, 1),
            ("e2.bias", 1, 2 * latent, 0), ("d1", latent, hidden, 1), ("d1.bias", 1, hidden, 0),
            ("mean", hidden, D, 0.1), ("skip", latent, D, 0.1), ("mean.bias", 1, D, 0),
            ("spread", hidden, D, 0.1), ("spread.bias", 1, D, 0))}
        u = torch.cat([prior.whiten(x).float() for x in reference[_spread(N, 32768)].split(4096)])
        turned, steps = torch.eye(D), min(steps, max(200, N // 2))
        for start, end in ((0, steps // 5), (steps // 5, steps // 2), (steps // 2, steps)):
            if start:  # turn u and all that reads or writes it
                missed = (x - prior.decode(prior.latents(x, noise)[0])[0] for x in u.split(4096))
                left, turn = torch.linalg.eigh(sum((e.T @ e / len(u)).double() for e in missed))
                turn = turn.float()
                w["e1"], turned = turn.T @ w["e1"], turned @ turn
                w.update({name: w[name] @ turn for name in ("mean", "skip", "mean.bias")})
                w["spread"] = 0.1 / math.sqrt(hidden) * noise(hidden, D)
                w["spread.bias"] = left.clamp(min=1e-6).log().float()
                for x in u.split(4096):
                    x.copy_(x @ turn)
            optimiser = torch.optim.Adam([x.requires_grad_() for x in w.values()])
            for step in range(start, end):
                optimiser.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
                x = u[torch.randint(len(u), (128,), generator=generator)]
                z, kl = prior.latents(x, noise)
                mean, log_s = prior.decode(z)
                miss = 0.5 * ((x - mean).square() * (-log_s).exp() + log_s).sum(1).mean()
                optimiser.zero_grad()
                (miss + kl.mean(0).clamp(min=free_bits).sum()).backward()
                optimiser.step()
            w.update({name: x.detach() for name, x in w.items()})
        return prior.settle(u, turned.double(), noise)

    def encode(self, u):
        """u (n, D) -> mean and log variance of q(z | u), (n, latent) each."""
        from torch.nn.functional import gelu

        w = self.weights
        u = u * (1 + u.square().mean(1, keepdim=True)).rsqrt()  # outliers are no louder than others
        mean, s = (gelu(u @ w["e1"] + w["e1.bias"]) @ w["e2"] + w["e2.bias"]).chunk(2, 1)
        return mean, -6 * s.sigmoid()

    def latents(self, u, noise):
        """A draw z of q(z | u), and KL(q || N(0, I)) in nats, (n, latent) each."""
        mean, log_v = self.encode(u)
        return (mean + noise(*mean.shape) * (log_v / 2).exp(),
                0.5 * (mean.square() + log_v.exp() - 1 - log_v))

    def decode(self, z):
        """z (n, latent) -> mean and log variance of p(y | z), (n, D) each."""
        from torch.nn.functional import gelu

        w = self.weights
        h = gelu(z @ w["d1"] + w["d1.bias"])
        return (h @ w["mean"] + z @ w["skip"] + w["mean.bias"],
                4 * ((h @ w["spread"] + w["spread.bias"]) / 4).tanh())

    def settle(self, u, turned, noise):
        """What follows training: the last linear map, the encoded rows that draws start from."""
        import torch

        N, first, second, spread, kl = len(u), 0.0, 0.0, 0.0, 0.0
        for x in u.split(4096):
            z, nats = self.latents(x, noise)
            f, log_s = self.decode(z)
            first, second = first + f.double().sum(0) / N, second + (f.T @ f / N).double()
            spread, kl = spread + log_s.double().exp().sum(0) / N, kl + nats.sum(0) / N
        told, total = second - first.outer(first), u.square().sum() / N
        variance, axes = torch.linalg.eigh(told + spread.diag())
        # y = u @ into + centre; back, y's covariance becomes I, that of the fitted Gaussian
        self.centre, self.log_det = first, variance.log().sum() / 2
        self.into = turned @ (axes * variance.sqrt() @ axes.T)
        self.back = (axes / variance.sqrt() @ axes.T) @ turned.T
        self.codes = tuple(x.double() for x in self.encode(u[_spread(N, 4096)]))
        self.kl = kl
        self.about = {"latent": len(kl), "active_units": (self.codes[0].var(0) > 0.01).sum(),
                      "kl_mean": kl.mean(), "kl_max": kl.max(), "told": told.trace() / total,
                      "variance": variance.sum() / total}
        self.noises = noise(4, 1, len(kl)).double()
        self.weights = {name: x.double() for name, x in self.weights.items()}
        self.weights["e1"] = turned @ self.weights["e1"]  # encode takes u unturned from here on
        return self

    def sample(self, n: int, generator):
        import torch

        mean, log_v = self.codes
        row = torch.randint(len(mean), (n,), generator=generator)
        z = mean[row] + _normal(n, mean.shape[1], generator) * (log_v[row] / 2).exp()
        f, log_s = self.decode(z)
        y = f + _normal(n, f.shape[1], generator) * (log_s / 2).exp()
        return self.place((y - self.centre) @ self.back).float()

    def log_prob(self, x):
        import torch

        if len(x) > 64:  # (S n, rows) below
            return torch.cat([self.log_prob(some) for some in x.split(64)])
        u, e, (code, log_w) = self.whiten(x), torch.cat((self.noises, -self.noises)), self.codes
        mean, log_v = self.encode(u)
        z = (mean + e * (log_v / 2).exp()).flatten(0, 1)  # (S n, latent)
        f, log_s = self.decode(z)
        y = (u @ self.into + self.centre).repeat(len(e), 1)
        # of every normal law twice its negative logarithm, without the (2 pi)s of z, which cancel
        p = ((y - f).square() * (-log_s).exp() + log_s + math.log(2 * math.pi)).sum(1)
        q = (e.square() + log_v).sum(2).flatten()
        weight = (-log_w).exp()
        agg = (z.square() @ weight.T - 2 * z @ (code * weight).T
               + (code.square() * weight + log_w).sum(1))  # (S n, rows)
        log_agg = torch.logsumexp(-0.5 * agg, 1) - math.log(len(code))
        bound = torch.logsumexp((log_agg + (q - p) / 2).view(len(e), -1), 0) - math.log(len(e))
        return (bound + self.log_det - self.scale.log().sum()).to(x.dtype)

    def report(self) -> dict[str, float | list[float]]:
        """Active latent dimensions (their means vary by more than 0.01, Burda et al. 2016), nats
        of each; as shares of u's variance, what they tell, and raw draws (1: no collapse)."""
        return {**super().report(), **{name: float(x) for name, x in self.about.items()},
                "kl": self.kl.sort(descending=True).values.tolist()}


class Posterior(Fitted):
    """What earlier runs learned, as the prior of the next task (posterior:RUN,RUN,...): the
    Gaussian of all their final rows. resample=1 takes the rows themselves, row j from row j of a
    run picked at random, so that one run alone is a warm start.

    The use that the paper names for trained prompts (paper 5). log_prob is the Gaussian's also with
    resample=1: MAP holds rows near where earlier prompts ended."""

    several, sources = True, True

    @classmethod
    def fit(cls, *runs, resample: int = 0, shrinkage: float = -1.0):
        import torch

        if resample not in (0, 1):
            raise PriorError(f"posterior: resample is {resample}, expected 0, or 1 for rows")
        prior = super().fit(torch.cat(runs), shrinkage)
        prior.runs = [r.float() for r in runs] if resample else []
        return prior

    def sample(self, n: int, generator):
        import torch

        if not self.runs:
            return super().sample(n, generator)
        chosen = torch.randint(len(self.runs), (n,), generator=generator).tolist()
        return torch.stack([self.runs[r][j % len(self.runs[r])] for j, r in enumerate(chosen)])


def _normal(n: int, width: int, generator):
    import torch

    return torch.randn(n, width, generator=generator, dtype=torch.float64)


def _spread(N: int, most: int):
    """Indices (at most `most`) spread evenly over N rows."""
    import torch

    return torch.arange(min(N, most)) * N // min(N, most)


PRIORS = {"isotropic": Isotropic, "xavier": Xavier, "vocab": Vocab, "text": Text, "fitted": Fitted,
          "exclusion": Exclusion, "interpolation": Interpolation, "sparse": Sparse, "vae": VAE,
          "posterior": Posterior}


def options(name: str) -> dict[str, object]:
    """A prior's options and their defaults, from its fit."""
    parameters = inspect.signature(PRIORS[name].fit).parameters
    return {p.name: p.default for p in parameters.values() if p.default is not p.empty}


def parse(spec: str) -> tuple[str, dict[str, object], list[str]]:
    """"exclusion:c=10,k=16" -> ("exclusion", {"c": 10.0, "k": 16}, []);
    "posterior:runs/a,runs/b,resample=1" -> ("posterior", {"resample": 1}, ["runs/a", "runs/b"])."""
    name, _, rest = spec.partition(":")
    if name not in PRIORS:
        raise PriorError(f"prior {name!r} is not known: use one of {', '.join(PRIORS)}")
    known, given, sources = options(name), {}, []
    for part in filter(None, rest.split(",")):
        key, equals, text = part.partition("=")
        if PRIORS[name].sources and not equals:
            sources.append(part)
            continue
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
    if PRIORS[name].sources and not sources:
        raise PriorError(f"prior {name} needs the folders of finished runs: write {name}:RUN, or "
                         f"{name}:RUN,RUN")
    return name, given, sources
