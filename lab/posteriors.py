"""Posteriors over a prompt: what training moves, and how.

A posterior holds a prompt's numbers as parameters, a tensor a layer: rows (n, D), or the keys and
values of a prefix (n, 2, G, hd). Each step it names its members, prompts whose loss is wanted.
Their gradients come back through them, and combine_gradients turns these into the direction in
which the posterior moves:

    posterior = POSTERIORS["svgd"](start, scales, weight=1 / answer_tokens, seed=0)
    for layers in posterior.members(step):       # {layer: (n, D)}
        (loss(layers) - log_prior(layers) / answer_tokens).backward()
    posterior.combine_gradients()
    optimiser.step()                             # any optimiser

Every member's objective is -log p(prompt | data) * weight, up to a constant: a mean loss per answer
token has weight 1 / (number of answer tokens).

K particles, n rows, D width, P numbers of a prompt in all.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor, nn

Layers = dict[int, Tensor]


class Point(nn.Module):
    """One prompt: maximum likelihood, or with a prior's density in the loss the MAP estimate."""

    clips = True  # whether the norm of its gradient may be bounded

    def __init__(self, start: Layers, scales: dict[int, float], weight: float, seed: int):
        """start {layer: (K, n, ...)}: K draws of the prior. scales {layer: root mean square of
        real rows there}, the unit of learning rates."""
        super().__init__()
        self.scales, self.weight, self.seed = scales, weight, seed
        self.layers = nn.ParameterDict()
        for i, draws in sorted(start.items()):
            self.layers[str(i)] = nn.Parameter(self.initial(draws).float().clone())

    def initial(self, draws: Tensor) -> Tensor:
        """What a layer's parameter begins as, of its K draws."""
        return draws[0]

    def numbers(self) -> Layers:
        """The numbers of each layer, with their gradient."""
        return {int(i): numbers for i, numbers in self.layers.items()}

    def groups(self, lr: float | None = None) -> list[dict]:
        """Parameter groups of an optimiser, with learning rates and names. lr: one rate for all
        layers; None: a twentieth of each layer's scale."""
        return [{"params": [numbers], "lr": lr or self.scales[i] / 20, "name": f"layer {i}"}
                for i, numbers in self.numbers().items()]

    def members(self, step: int) -> list[Layers]:
        """The prompts whose gradients are wanted; a pure function of parameters, seed and step."""
        return [self.numbers()]

    def extra_loss(self) -> Tensor | None:
        """What the objective has besides the members' losses; differentiated once a step."""
        return None

    def combine_gradients(self) -> None:
        """Turn the members' gradients into the posterior's."""

    def mean(self) -> Layers:
        """The one prompt that stands for the posterior."""
        return {i: numbers.detach() for i, numbers in self.numbers().items()}

    def evaluated(self) -> list[Layers]:
        """The prompts whose token probabilities an evaluation averages."""
        return [self.mean()]

    def tensors(self) -> dict[str, Tensor]:
        """What a run keeps, the mean prompt as `layers.I`; `particles` reads it."""
        return {f"layers.{i}": numbers for i, numbers in self.mean().items()}


class Encoded(Point):
    """One prompt that is its start plus what a small network makes of fewer or common numbers, so
    that rows and layers share what they learn.

    mlp: one vector a row for all layers, through two linear maps with a tanh between (prefix
    tuning, Li and Liang 2021; P-tuning v2). shared: one vector a row and layer, and from it the key
    by one linear map and the value by another (the shared structure of arXiv 2410.02200). The last
    maps begin at zero, so the prompt begins as the prior drew it."""

    def __init__(self, start: Layers, scales: dict[int, float], weight: float, seed: int,
                 kind: str):
        """start {layer: (1, n, ...)}."""
        super().__init__(start, scales, weight, seed)
        for numbers in self.layers.values():
            numbers.requires_grad_(False)
        widths = {i: numbers[0].numel() for i, numbers in self.layers.items()}
        n = len(next(iter(self.layers.values())))
        generator = torch.Generator().manual_seed(seed)

        # Checkpoints have these names of parameters: first and last are the two maps, common the
        # vectors. With kind shared, a row's vector is as wide as its key, half of its numbers.
        self.width = max(widths.values()) // (2 if kind == "shared" else 1)
        self.first = None
        if kind == "mlp":
            weights = torch.randn(self.width, self.width, generator=generator)
            self.first = nn.Parameter(weights / self.width**0.5)
        self.common = nn.ParameterDict()
        for name in ["all"] if kind == "mlp" else widths:
            vectors = torch.randn(n, self.width, generator=generator)
            self.common[name] = nn.Parameter(vectors)
        self.last = nn.ParameterDict()
        for i, width in widths.items():
            self.last[i] = nn.Parameter(torch.zeros(self.width, width))

    def numbers(self) -> Layers:
        hidden = {}
        for name, vectors in self.common.items():
            mixed = vectors if self.first is None else vectors @ self.first
            hidden[name] = torch.tanh(mixed)
        layers = {}
        for i, start in self.layers.items():
            layer_hidden = hidden["all"] if "all" in hidden else hidden[i]
            change = layer_hidden @ self.last[i]
            layers[int(i)] = start + self.scales[int(i)] * change.view_as(start)
        return layers

    def groups(self, lr: float | None = None) -> list[dict]:
        # Every number of a row is a sum over the hidden numbers, all of which move: the step that
        # a row makes grows with their number, so the rate falls with it.
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": trained, "lr": lr or 0.2 / self.width, "name": "network"}]


class Particles(Point):
    """Stein variational gradient descent: K prompts that follow the posterior's gradient and keep
    apart by a kernel (Liu and Wang 2016, equation 8; over prompts as in BMTPT)."""

    def initial(self, draws: Tensor) -> Tensor:
        return draws

    def members(self, step: int) -> list[Layers]:
        layers = self.numbers()
        K = len(next(iter(layers.values())))
        return [{i: numbers[k] for i, numbers in layers.items()} for k in range(K)]

    @torch.no_grad()
    def combine_gradients(self) -> None:
        # Positions in units of each layer's scale, so that no layer alone decides who is near.
        positions, scores, sizes = [], [], []
        for i, numbers in self.numbers().items():
            scale = self.scales[i]
            positions.append(numbers.flatten(1) / scale)
            scores.append(-numbers.grad.flatten(1) * (scale / self.weight))
            sizes.append(numbers[0].numel())
        directions = svgd(torch.cat(positions, dim=1), torch.cat(scores, dim=1)).split(sizes, dim=1)

        for (i, numbers), direction in zip(self.numbers().items(), directions):
            numbers.grad.copy_((-direction * (self.weight / self.scales[i])).view_as(numbers))

    def mean(self) -> Layers:
        return {i: numbers.detach().mean(dim=0) for i, numbers in self.numbers().items()}

    def evaluated(self) -> list[Layers]:
        return [{i: numbers.detach() for i, numbers in layers.items()}
                for layers in self.members(0)]

    def tensors(self) -> dict[str, Tensor]:
        particles = {f"layers.{i}.particles": numbers.detach()
                     for i, numbers in self.numbers().items()}
        return super().tensors() | particles


def svgd(x: Tensor, score: Tensor) -> Tensor:
    """Particles x (K, P) and the gradients of the log posterior there (K, P) -> the direction
    (K, P) in which they approach the posterior fastest in the unit ball of the RBF kernel's space:

        phi(x_i) = 1/K sum_j [ k(x_j, x_i) score_j + grad_j k(x_j, x_i) ],
        k(x, y) = exp(-|x - y|^2 / h),  h = median |x - y|^2 / log(K + 1).

    One particle follows its gradient."""
    K = len(x)
    # Differences, because products of near particles lose all digits of their distance.
    squares = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    pairs = squares[~torch.eye(K, dtype=torch.bool, device=x.device)]
    h = squares.new_tensor(1.0)
    if K > 1 and pairs.median() > 0:
        h = pairs.median() / math.log(K + 1)
    kernel = torch.exp(-squares / h)
    # sum_j grad_j k(x_j, x_i) = 2 / h sum_j k_ij (x_i - x_j)
    repulsion = 2 / h * (kernel.sum(dim=1, keepdim=True) * x - kernel @ x)
    return (kernel @ score + repulsion) / K


class MeanField(Point):
    """A Gaussian with a mean and a standard deviation for every number of the prompt, fitted by
    maximising the evidence lower bound E_q[log p(data | rows) + log prior - log q] with one sampled
    prompt a step (reparameterised; as in variational prompt learning)."""

    RATE = 0.05  # of the log standard deviations, which have no scale
    # Clipping would shrink the large ones of its noisy gradients, whose mean would then not be the
    # gradient of the bound: training would end at another optimum.
    clips = False

    def __init__(self, start: Layers, scales: dict[int, float], weight: float, seed: int):
        super().__init__(start, scales, weight, seed)
        # A tenth of a real row's size is wide enough to feel the loss and too narrow to drown it.
        self.log_sd = nn.ParameterDict()
        for i, numbers in self.layers.items():
            start_value = math.log(scales[int(i)] / 10)
            self.log_sd[i] = nn.Parameter(torch.full_like(numbers, start_value))

    def groups(self, lr: float | None = None) -> list[dict]:
        deviations = {"params": [*self.log_sd.values()], "lr": self.RATE,
                      "name": "log standard deviations"}
        return [*super().groups(lr), deviations]

    def members(self, step: int) -> list[Layers]:
        deviations = {int(i): log_sd.exp() for i, log_sd in self.log_sd.items()}
        return [draw_normal(self.numbers(), deviations, f"{self.seed} {step}")]

    def extra_loss(self) -> Tensor:
        """Minus the entropy of q, up to a constant."""
        return -self.weight * sum(log_sd.sum() for log_sd in self.log_sd.values())

    def tensors(self) -> dict[str, Tensor]:
        deviations = {f"layers.{i}.sd": log_sd.detach().exp() for i, log_sd in self.log_sd.items()}
        return super().tensors() | deviations


def draw_normal(mean: Layers, sd: Layers, seed: str) -> Layers:
    """One prompt of a mean-field Gaussian, a function of the seed alone."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    layers = {}
    for i, centre in mean.items():
        noise = torch.randn(centre.shape, generator=generator).to(centre.device)
        layers[i] = centre + sd[i] * noise
    return layers


def particles(tensors: dict[str, Tensor], count: int, seed: int) -> list[Layers]:
    """The prompts of a posterior that `tensors` wrote: the one, its particles, or `count` draws of
    its Gaussian."""
    by_kind: dict[str, Layers] = {}
    for name, t in tensors.items():
        _, layer, *kind = name.split(".")
        by_kind.setdefault("".join(kind), {})[int(layer)] = t
    if "particles" in by_kind:
        K = len(next(iter(by_kind["particles"].values())))
        return [{i: t[k] for i, t in by_kind["particles"].items()} for k in range(K)]
    if "sd" in by_kind:
        return [draw_normal(by_kind[""], by_kind["sd"], f"{seed} draw {k}") for k in range(count)]
    return [by_kind[""]]


POSTERIORS = {"point": Point, "svgd": Particles, "gaussian": MeanField}
