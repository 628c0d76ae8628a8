"""Posteriors over a prompt: what training moves, and how.

A posterior holds a prompt's numbers as parameters, a tensor a layer: rows (n, D), or the keys and
values of a prefix (n, 2, G, hd). Each step it names its members, prompts whose loss is wanted.
Their gradients come back through them to the parameters, which the posterior's optimiser moves:

    posterior = Langevin(start, units, weight=1 / answer_tokens, seed=0)
    optimiser = posterior.optimiser()
    for layers in posterior.members(step):       # {layer: (n, D)}
        (loss(layers) - log_prior(layers) / answer_tokens).backward()
    optimiser.step()

Every member's objective is -log p(prompt | data) * weight, up to a constant: a mean loss per answer
token has weight 1 / (number of answer tokens).

K particles, n rows, D width.
"""

from __future__ import annotations

import functools
import math
import random
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

Layers = dict[int, Tensor]


class Point(nn.Module):
    """One prompt: maximum likelihood, or with a prior's density in the loss the MAP estimate."""

    clips = True  # whether the norm of its gradient may be bounded

    def __init__(self, start: Layers, units: dict[int, float], weight: float, seed: int):
        """start {layer: (K, n, ...)}: K draws of the prior. units {layer: what its numbers are
        measured in}, here the root mean square of real rows."""
        super().__init__()
        self.units, self.weight, self.seed = units, weight, seed
        self.layers = nn.ParameterDict()
        for i, draws in sorted(start.items()):
            self.layers[str(i)] = nn.Parameter(self.initial(draws).float().clone())

    def initial(self, draws: Tensor) -> Tensor:
        """What a layer's parameter begins as, of its K draws."""
        return draws[0]

    def numbers(self) -> Layers:
        """The numbers of each layer, with their gradient."""
        return {int(i): numbers for i, numbers in self.layers.items()}

    def groups(self, lr: float | None = None, factor: float = 1.0) -> list[dict]:
        """Parameter groups of an optimiser, with learning rates and names. lr: one rate for all
        layers; None: a twentieth of each layer's unit. factor: multiplies either."""
        return [{"params": [numbers], "lr": factor * (lr or self.units[int(i)] / 20),
                 "name": f"layer {i}"} for i, numbers in self.layers.items()]

    def optimiser(self, lr: float | None = None, factor: float = 1.0) -> torch.optim.Optimizer:
        """What moves the parameters. AdamW has no weight decay here, which would be a pull towards
        zero, a prior that nobody chose."""
        return torch.optim.AdamW(self.groups(lr, factor), weight_decay=0.0)

    def members(self, step: int) -> list[Layers]:
        """The prompts whose gradients are wanted; a pure function of parameters, seed and step."""
        return [self.numbers()]

    def extra_loss(self) -> Tensor | None:
        """What the objective has besides the members' losses; differentiated once a step."""
        return None

    def representative(self) -> Layers:
        """The one prompt that stands for the posterior."""
        return {i: numbers.detach() for i, numbers in self.numbers().items()}

    def evaluated(self) -> list[Layers]:
        """The prompts whose token probabilities an evaluation averages."""
        return [self.representative()]

    def report(self) -> dict[str, float]:
        """Figures that say how the posterior lies in its prior."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What a run keeps, the representative as `layers.I`; `particles` reads it."""
        return {f"layers.{i}": numbers for i, numbers in self.representative().items()}


class PartlyFrozen(Point):
    """One prompt whose first rows, or columns of a prefix, are not trained. In front of a text the
    first position is often an attention sink, and moving it changes the model's answers to every
    text; Cartridges (arXiv 2506.06266) freeze it too."""

    def __init__(self, start: Layers, units: dict[int, float], weight: float, seed: int,
                 frozen: int):
        """start {layer: (1, n, ...)}. frozen: how many rows are not trained, fewer than n."""
        super().__init__({i: draws[:, frozen:] for i, draws in start.items()}, units, weight, seed)
        # a parameter, so that checkpoints have it
        self.frozen = nn.ParameterDict({
            i: nn.Parameter(start[int(i)][0, :frozen].float().clone(), requires_grad=False)
            for i in self.layers})

    def numbers(self) -> Layers:
        return {int(i): torch.cat([self.frozen[i], numbers]) for i, numbers in self.layers.items()}


class Encoded(Point):
    """One prompt that is its start plus what a small network makes of fewer or common numbers, so
    that rows and layers share what they learn.

    mlp: one vector a row for all layers, through two linear maps with a tanh between (prefix
    tuning, Li and Liang 2021; P-tuning v2). shared: one vector a row and layer, and from it the key
    by one linear map and the value by another (the shared structure of arXiv 2410.02200). The last
    maps begin at zero, so the prompt begins as the prior drew it."""

    def __init__(self, start: Layers, units: dict[int, float], weight: float, seed: int,
                 kind: str):
        """start {layer: (1, n, ...)}."""
        super().__init__(start, units, weight, seed)
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
            layers[int(i)] = start + self.units[int(i)] * change.view_as(start)
        return layers

    def groups(self, lr: float | None = None, factor: float = 1.0) -> list[dict]:
        # Every number of a row is a sum over the hidden numbers, all of which move: the step that
        # a row makes grows with their number, so the rate falls with it.
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": trained, "lr": factor * (lr or 0.2 / self.width), "name": "network"}]


class Confined(Point):
    """One prompt whose rows move from their start in a few directions alone, the columns of a basis
    (W, k) of each layer: row = start + sqrt(W / k) basis z. With the factor a step of the optimiser
    is as long as that of a row that may go anywhere, whatever k."""

    def __init__(self, start: Layers, units: dict[int, float], weight: float, seed: int,
                 bases: Layers):
        """start {layer: (1, n, ...)}, with W numbers a row. bases {layer: (W, k)}, orthonormal
        columns."""
        super().__init__(start, units, weight, seed)
        self.bases, self.coordinates = nn.ParameterDict(), nn.ParameterDict()
        for i, numbers in self.layers.items():
            numbers.requires_grad_(False)
            # a parameter, so that checkpoints have it: fitted again it could differ by rounding
            self.bases[i] = nn.Parameter(bases[int(i)].float(), requires_grad=False)
            self.coordinates[i] = nn.Parameter(torch.zeros(len(numbers), bases[int(i)].shape[1]))

    def numbers(self) -> Layers:
        layers = {}
        for i, start in self.layers.items():
            W, k = self.bases[i].shape
            change = (W / k)**0.5 * self.coordinates[i] @ self.bases[i].T
            layers[int(i)] = start + change.view_as(start)
        return layers

    def groups(self, lr: float | None = None, factor: float = 1.0) -> list[dict]:
        return [{"params": [z], "lr": factor * (lr or self.units[int(i)] / 20),
                 "name": f"layer {i}"} for i, z in self.coordinates.items()]


class Gaussian(NamedTuple):
    """N(mean, basis diag(scale^2) basis^T): mean (D,), basis (D, D) orthonormal, scale (D,)."""

    mean: Tensor
    basis: Tensor
    scale: Tensor


class Axes(nn.Module):
    """The whitened coordinates of a Gaussian, in which it is N(0, I), by falling variance."""

    def __init__(self, gaussian: Gaussian):
        super().__init__()
        for name, t in gaussian._asdict().items():
            self.register_buffer(name, t.float())

    def rows(self, z: Tensor) -> Tensor:
        """Coordinates (..., n, D) -> rows (..., n, D)."""
        return self.mean + z * self.scale @ self.basis.T

    def noise(self, shape: torch.Size, seed: str) -> Tensor:
        """Standard normal coordinates of this shape, a function of the seed. They are drawn as
        rows and turned into the axes: the rows that they stand for are then the same whichever
        sign an eigenvector came out with."""
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        return torch.randn(shape, generator=generator).to(self.basis.device) @ self.basis


class Whitened(Point):
    """A posterior of several prompts. Its parameters are coordinates in which a Gaussian like the
    prior is N(0, I), so a step and a spread mean the same in every direction and at every layer."""

    # Clipping would shrink the large ones of its noisy gradients, whose mean would then not be the
    # gradient of the objective: training would end at another posterior.
    clips = False

    def __init__(self, start: Layers, units: dict[int, Gaussian], weight: float, seed: int):
        """start {layer: (K, n, D)}: K draws of the prior. units {layer: the Gaussian that its rows
        are measured in}: the prior if it is one, else that of the reference."""
        coordinates = {}
        for i, draws in start.items():
            mean, basis, scale = (t.double() for t in units[i])
            coordinates[i] = (draws.double() - mean) @ basis / scale
        super().__init__(coordinates, dict.fromkeys(start, 1.0), weight, seed)
        self.axes = nn.ModuleDict({str(i): Axes(units[i]) for i in sorted(start)})

    def rows(self, coordinates: Layers) -> Layers:
        """Coordinates {layer: (..., n, D)} -> rows {layer: (..., n, D)}."""
        return {i: self.axes[str(i)].rows(z) for i, z in coordinates.items()}

    def noise(self, shape: torch.Size, layer: int, seed: str) -> Tensor:
        return self.axes[str(layer)].noise(shape, f"{self.seed} {layer} {seed}")

    def prompts(self) -> Layers:
        """Coordinates {layer: (K, n, D)} of the prompts that stand for the posterior."""
        raise NotImplementedError

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        prompts = self.rows(self.prompts())
        return super().tensors() | {f"layers.{i}.particles": x for i, x in prompts.items()}


class Langevin(Whitened):
    """K chains of stochastic gradient Langevin dynamics, each from its own draw of the prior; see
    LangevinSteps. The chains are independent but for the batches that they see."""

    def initial(self, draws: Tensor) -> Tensor:
        return draws

    def optimiser(self, lr: float | None = None, factor: float = 1.0) -> torch.optim.Optimizer:
        layers = sorted(self.numbers())
        noises = [functools.partial(self.noise, layer=i) for i in layers]
        return LangevinSteps(self.groups(lr, factor), noises, self.weight)

    def members(self, step: int) -> list[Layers]:
        coordinates = self.numbers()
        K = len(next(iter(coordinates.values())))
        # Each has a graph of its own, because its gradient is taken before the next one's loss.
        return [self.rows({i: z[k] for i, z in coordinates.items()}) for k in range(K)]

    def prompts(self) -> Layers:
        return {i: z.detach() for i, z in self.numbers().items()}

    @torch.no_grad()
    def representative(self) -> Layers:
        """The first chain's, because the mean of chains in different modes is no good prompt."""
        return self.rows({i: z[0] for i, z in self.numbers().items()})

    @torch.no_grad()
    def evaluated(self) -> list[Layers]:
        return self.members(0)

    def report(self) -> dict[str, float]:
        """spread: the variance between the particles over that of the Gaussian that rows are
        measured in, a mean over its whitened coordinates. Particles that are copies of one prompt
        have 0."""
        z = torch.cat([z.flatten(1) for z in self.prompts().values()], dim=1)  # (K, P)
        return {"spread": float(z.var(dim=0).mean())} if len(z) > 1 else {}


class LangevinSteps(torch.optim.Optimizer):
    """Preconditioned stochastic gradient Langevin dynamics (Welling and Teh 2011; Li et al. 2016)
    in whitened coordinates z, with the noise of Leimkuhler and Matthews (2013):

        z <- z - rate U' + sqrt(2 rate) (noise(step) + noise(step + 1)) / 2,
        rate = lr / (1 + sqrt(mean U'^2)).

    U' is the gradient of -log p(prompt | data). Its mean square, one for every coordinate, is over
    all chains and many steps, because a rate that followed its own chain would change the law. A
    step is about lr prior standard deviations, as one of RMSprop is; where the data say nothing the
    rate is lr / 2.

    With exact gradients and constant rates the stationary law of a Gaussian posterior is exact,
    however large the rate at which the chains are stable; Euler's steps would make it too wide. A
    minibatch's noise of variance V in U' makes it wider by a share of rate V / 2."""

    DECAY = 0.999  # of the mean squares, per step

    def __init__(self, groups: list[dict], noises: list[Callable], weight: float):
        """groups: of one parameter (K, n, D) each. noises: noise(shape, seed=...) of each group.
        weight: what -log p was multiplied by before its gradient was taken."""
        super().__init__(groups, {"lr": 0.05})
        self.noises, self.weight = noises, weight

    @torch.no_grad()
    def step(self) -> None:
        for group, noise in zip(self.param_groups, self.noises):
            [z] = group["params"]
            state, gradient = self.state[z], z.grad / self.weight
            if not state:  # the names are those of Adam, which a checkpoint knows
                state |= {"step": torch.zeros(()), "exp_avg_sq": torch.zeros_like(z[0])}
            step = int(state["step"])
            state["step"] += 1

            squares = state["exp_avg_sq"]
            squares.lerp_(gradient.square().mean(dim=0), 1 - self.DECAY)
            mean_square = squares / (1 - self.DECAY**(step + 1))
            rate = group["lr"] / (1 + mean_square.sqrt())
            ends = [noise(z.shape, seed=str(s)) for s in (step, step + 1)]
            z += (2 * rate).sqrt() * (ends[0] + ends[1]) / 2 - rate * gradient


class MeanField(Whitened):
    """A Gaussian with a mean and a standard deviation for every whitened coordinate of the prompt,
    fitted by maximising the evidence lower bound E_q[log p(data | rows) + log prior - log q] with
    one sampled prompt a step (reparameterised; as in variational prompt learning). The prior itself
    is such a Gaussian if it is one at all, so the axes put no floor under the KL divergence."""

    RATE = 0.05  # of the log standard deviations
    NARROW = 0.9  # standard deviations over the Gaussian's below which the data told something

    def __init__(self, start: Layers, units: dict[int, Gaussian], weight: float, seed: int):
        super().__init__(start, units, weight, seed)
        self.draws = len(next(iter(start.values())))
        # Of the standard deviation over the prior's. A tenth is wide enough to feel the loss and
        # too narrow to drown it.
        self.log_ratio = nn.ParameterDict()
        for i, z in self.layers.items():
            self.log_ratio[i] = nn.Parameter(torch.full_like(z, math.log(0.1)))

    def groups(self, lr: float | None = None, factor: float = 1.0) -> list[dict]:
        deviations = {"params": [*self.log_ratio.values()], "lr": self.RATE,
                      "name": "log standard deviations"}
        return [*super().groups(lr, factor), deviations]

    def draw(self, seed: str) -> Layers:
        """Coordinates {layer: (n, D)} of a prompt, a function of the seed."""
        drawn = {}
        for i, mean in self.numbers().items():
            noise = self.noise(mean.shape, i, seed)
            drawn[i] = mean + self.log_ratio[str(i)].exp() * noise
        return drawn

    def members(self, step: int) -> list[Layers]:
        return [self.rows(self.draw(str(step)))]

    def extra_loss(self) -> Tensor:
        """Minus the entropy of q, up to a constant."""
        return -self.weight * sum(log_ratio.sum() for log_ratio in self.log_ratio.values())

    def prompts(self) -> Layers:
        drawn = [self.draw(f"draw {k}") for k in range(self.draws)]
        return {i: torch.stack([draw[i] for draw in drawn]) for i in drawn[0]}

    @torch.no_grad()
    def representative(self) -> Layers:
        """Its mean."""
        return self.rows(self.numbers())

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Against the Gaussian that rows are measured in. spread: the ratio of variances, a mean
        over all coordinates. narrowed: coordinates whose ratio of standard deviations the data took
        below NARROW. narrowest: the smallest such ratio. kl: KL(q || Gaussian), nats."""
        mean = torch.cat([z.flatten() for z in self.numbers().values()])
        log_ratio = torch.cat([z.flatten() for z in self.log_ratio.values()])
        ratio = log_ratio.exp()
        kl = 0.5 * (ratio.square() + mean.square() - 1) - log_ratio
        return {"spread": float(ratio.square().mean()), "kl": float(kl.sum()),
                "narrowed": int((ratio < self.NARROW).sum()), "narrowest": float(ratio.min())}


def particles(tensors: dict[str, Tensor], count: int, seed: int) -> list[Layers]:
    """The prompts of a posterior that `tensors` wrote: the one, or all that stand for it. Runs of
    early versions have the standard deviation of every number instead; then `count` draws."""
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


def draw_normal(mean: Layers, sd: Layers, seed: str) -> Layers:
    """One prompt of a Gaussian whose numbers are independent, a function of the seed alone."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    layers = {}
    for i, centre in mean.items():
        noise = torch.randn(centre.shape, generator=generator).to(centre.device)
        layers[i] = centre + sd[i] * noise
    return layers


POSTERIORS = {"point": Point, "sgld": Langevin, "gaussian": MeanField}
