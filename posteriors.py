"""Posteriors over the rows of a prompt: what training moves, and how. Needs torch.

A posterior holds rows {layer: (n, D)} as parameters. Each step it names its members, prompts whose
loss is wanted; their gradients come back through them, and `settle` makes of these the direction
in which the posterior moves:

    posterior = POSTERIORS["svgd"](start, scales, weight=1 / answer_tokens, seed=0)
    for rows in posterior.members(step):       # {layer: (n, D)}
        (loss(rows) - log_prior(rows) / answer_tokens).backward()
    posterior.settle()
    optimiser.step()                           # any optimiser

The objective of every member is J(rows) = -log p(rows | data) * weight, up to a constant: a mean
loss per answer token has weight 1 / (number of answer tokens).

K particles, n rows, D width, P numbers of a prompt in all.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor, nn

Rows = dict[int, Tensor]


class Point(nn.Module):
    """One prompt: maximum likelihood, or with a prior's density in the loss the MAP estimate."""

    clips = True  # whether its gradient's norm may be bounded

    def __init__(self, start: Rows, scales: dict[int, float], weight: float, seed: int):
        """start {layer: (K, n, D)}; scales {layer: root mean square of real rows there}."""
        super().__init__()
        self.scales, self.weight, self.seed = scales, weight, seed
        self.layers = nn.ParameterDict({str(i): nn.Parameter(self.begin(r).float().clone())
                                        for i, r in sorted(start.items())})

    def begin(self, start: Tensor) -> Tensor:
        return start[0]

    @property
    def rows(self) -> Rows:
        return {int(i): r for i, r in self.layers.items()}

    def groups(self, lr: float | None = None) -> list[dict]:
        """An optimiser's parameter groups with their learning rates and names; lr: one for all
        instead of a twentieth of each layer's scale."""
        return [{"params": [r], "lr": lr or self.scales[i] / 20, "name": f"layer {i}"}
                for i, r in self.rows.items()]

    def members(self, step: int) -> list[Rows]:
        """The prompts whose gradients are wanted; a pure function of parameters, seed and step."""
        return [self.rows]

    def cost(self) -> Tensor | float:
        """What the objective has beside the members' own, to be differentiated once a step."""
        return 0.0

    def settle(self) -> None:
        """Turn the members' gradients into the posterior's."""

    def mean(self) -> Rows:
        """The one prompt that stands for the posterior."""
        return {i: r.detach() for i, r in self.rows.items()}

    def scored(self) -> list[Rows]:
        """The prompts that an evaluation averages."""
        return [self.mean()]

    def tensors(self) -> dict[str, Tensor]:
        """What the run keeps, the mean prompt under `layers.I`; `particles` reads it."""
        return {f"layers.{i}": r for i, r in self.mean().items()}


class Encoded(Point):
    """One prompt whose rows are its start and what a small network makes of fewer or common
    numbers, so that what one row or layer learns the others share.

    mlp: one vector a row for all layers, through two linear maps with a tanh between (prefix
    tuning, Li and Liang 2021; P-tuning v2). shared: one vector a row and layer, and from it by one
    linear map the key, by another the value (the shared structure of arXiv 2410.02200). The last
    maps begin at zero, so the rows begin as the prior drew them."""

    def __init__(self, start: Rows, scales: dict[int, float], weight: float, seed: int, kind: str):
        """start {layer: (1, n, W)}."""
        super().__init__(start, scales, weight, seed)
        for r in self.layers.values():
            r.requires_grad_(False)
        widths = {i: r.shape[1] for i, r in self.layers.items()}
        n, g = len(next(iter(self.layers.values()))), torch.Generator().manual_seed(seed)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=g) / shape[0]**0.5)
        # half of a key and value side by side: a row's common vector is as wide as one of the two
        self.hidden = max(widths.values()) // (2 if kind == "shared" else 1)
        self.first = draw(self.hidden, self.hidden) if kind == "mlp" else None
        self.common = nn.ParameterDict({name: nn.Parameter(torch.randn(n, self.hidden, generator=g))
                                        for name in (["all"] if kind == "mlp" else widths)})
        self.last = nn.ParameterDict({i: nn.Parameter(torch.zeros(self.hidden, w))
                                      for i, w in widths.items()})

    @property
    def rows(self) -> Rows:
        hidden = {name: torch.tanh(c if self.first is None else c @ self.first)
                  for name, c in self.common.items()}
        return {int(i): r + self.scales[int(i)] * (hidden.get(i, hidden.get("all")) @ self.last[i])
                for i, r in self.layers.items()}

    def groups(self, lr: float | None = None) -> list[dict]:
        # every hidden number moves a row: as many as there are, so much smaller are the steps
        return [{"params": [p for p in self.parameters() if p.requires_grad],
                 "lr": lr or 0.2 / self.hidden, "name": "network"}]


class Particles(Point):
    """Stein variational gradient descent: K prompts that follow the posterior's gradient and keep
    apart by a kernel (Liu and Wang 2016, equation 8; over prompts as in BMTPT)."""

    def begin(self, start: Tensor) -> Tensor:
        return start

    def members(self, step: int) -> list[Rows]:
        return [{i: r[k] for i, r in self.rows.items()}
                for k in range(len(next(iter(self.rows.values()))))]

    @torch.no_grad()
    def settle(self) -> None:
        # in units of each layer's scale, so that no layer alone decides who is near
        rows = self.rows.items()
        x = torch.cat([r.flatten(1) / self.scales[i] for i, r in rows], dim=1)
        score = torch.cat([-r.grad.flatten(1) * (self.scales[i] / self.weight) for i, r in rows],
                          dim=1)
        parts = svgd(x, score).split([r[0].numel() for _, r in rows], dim=1)
        for (i, r), phi in zip(rows, parts):
            r.grad.copy_((-phi * (self.weight / self.scales[i])).view_as(r))

    def mean(self) -> Rows:
        return {i: r.detach().mean(dim=0) for i, r in self.rows.items()}

    def scored(self) -> list[Rows]:
        return [{i: r.detach() for i, r in rows.items()} for rows in self.members(0)]

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"layers.{i}.particles": r.detach()
                                    for i, r in self.rows.items()}


def svgd(x: Tensor, score: Tensor) -> Tensor:
    """Particles x (K, P) and the gradients of the log posterior there (K, P) -> the direction
    (K, P) in which they approach it fastest in the unit ball of the RBF kernel's space:

        phi(x_i) = 1/K sum_j [ k(x_j, x_i) score_j + grad_j k(x_j, x_i) ],
        k(x, y) = exp(-|x - y|^2 / h),  h = median |x - y|^2 / log(K + 1).

    One particle follows its gradient."""
    K = len(x)
    square = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    apart = square[~torch.eye(K, dtype=torch.bool, device=x.device)]
    h = apart.median() / math.log(K + 1) if K > 1 and apart.median() > 0 else square.new_tensor(1.0)
    k = torch.exp(-square / h)
    # sum_j grad_j k(x_j, x_i) = 2 / h sum_j k_ij (x_i - x_j)
    return (k @ score + 2 / h * (k.sum(dim=1, keepdim=True) * x - k @ x)) / K


class MeanField(Point):
    """A Gaussian with a mean and a standard deviation for every number of the rows, fitted by
    maximising the evidence lower bound E_q[log p(data | rows) + log prior - log q] with one sampled
    prompt a step (reparameterised; as in variational prompt learning)."""

    RATE = 0.05  # of the log standard deviations, which know no scale
    clips = False  # or the large ones of its noisy gradients would count less: another optimum

    def __init__(self, start: Rows, scales: dict[int, float], weight: float, seed: int):
        super().__init__(start, scales, weight, seed)
        # a tenth of a real row's size: wide enough to feel the loss, too narrow to drown it
        self.log_sd = nn.ParameterDict({
            i: nn.Parameter(torch.full_like(r, math.log(scales[int(i)] / 10)))
            for i, r in self.layers.items()})

    def groups(self, lr: float | None = None) -> list[dict]:
        return [*super().groups(lr), {"params": [*self.log_sd.values()], "lr": self.RATE,
                                      "name": "log standard deviations"}]

    def members(self, step: int) -> list[Rows]:
        return [draw_normal(self.layers, {i: s.exp() for i, s in self.log_sd.items()},
                            f"{self.seed} {step}")]

    def cost(self) -> Tensor:
        """Minus q's entropy, up to a constant."""
        return -self.weight * sum(s.sum() for s in self.log_sd.values())

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"layers.{i}.sd": s.detach().exp()
                                    for i, s in self.log_sd.items()}


def draw_normal(mean: dict[str, Tensor], sd: dict[str, Tensor], seed: str) -> Rows:
    """One prompt of a mean-field Gaussian, by the seed alone."""
    g = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    return {int(i): m + sd[i] * torch.randn(m.shape, generator=g).to(m.device)
            for i, m in mean.items()}


def particles(tensors: dict[str, Tensor], count: int, seed: int) -> list[Rows]:
    """The prompts of a posterior as `tensors` gave it: the one, its particles, or `count` draws of
    its Gaussian."""
    of = lambda *kind: {name.split(".")[1]: t for name, t in tensors.items()
                        if tuple(name.split(".")[2:]) == kind}
    mean, sd, each = of(), of("sd"), of("particles")
    if each:
        K = len(next(iter(each.values())))
        return [{int(i): r[k] for i, r in each.items()} for k in range(K)]
    if sd:
        return [draw_normal(mean, sd, f"{seed} draw {k}") for k in range(count)]
    return [{int(i): r for i, r in mean.items()}]


POSTERIORS = {"point": Point, "svgd": Particles, "gaussian": MeanField}
