"""What a prompt before a text does to attention, from the weights that llama hands out; the command
attention.

A prefix can only scale what content pays to content, and add a bias of few directions (Petrov et
al. 2024, arXiv 2310.19698). This module measures both at each layer:

    with torch.no_grad():
        rows = measure_attention(model, prompt.past(model), texts)
    print(table(rows, TITLES))

n prompt columns, T tokens of a text, D width, H heads, G key/value heads, hd head width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import llama
from lab import pictures
from lab.commands import AttentionOptions
from lab.compare import TITLES
from lab.console import UserError, counted, say, show, table
from lab.evaluation import OpenRun, open_run
from lab.inputs import encode, evaluation_examples, sample_topics
from lab.settings import from_flags, spec_name


class Effect(NamedTuple):
    """What a prompt does to a layer's attention in one text; measure_attention explains the
    numbers."""

    mass: Tensor
    content: Tensor
    shift: Tensor
    bias: Tensor
    heads: Tensor  # (H, T, hd): what the prompt's values add to each head's output
    output: Tensor  # (T, D): what they add to the layer's output


@torch.no_grad()
def measure_attention(model: llama.Llama, past: llama.Past, texts: list[list[int]]
                      ) -> list[tuple[str, dict[str, float]]]:
    """What a prompt in front of token rows does to attention, at each layer where it has columns.

    mass: the share of attention that goes to the prompt, mean over heads and tokens
    content: the largest difference, with and without the prompt, between shares of the attention
        that a token pays to content (shares of content alone sum to 1)
    shift: the mean total variation between these shares, with and without the prompt
    bias: the mean norm of the prompt's contribution to attention's output, over that of the output
    one: the largest squared singular value over the sum of all, of the prompt's contribution to the
        layer's output at all positions (T, D)
    one_head: the same of a head's output (T, hd), mean over heads

    content and shift are 0 at the first layer with columns, whose input is the same either way."""
    effects: dict[int, list[Effect]] = {}
    for ids in texts:
        for i, effect in text_effects(model, past, ids).items():
            effects.setdefault(i, []).append(effect)
    return [(f"layer {i}", _summary(layer)) for i, layer in effects.items()]


def text_effects(model: llama.Llama, past: llama.Past, ids: list[int]) -> dict[int, Effect]:
    """{layer: Effect} of one text, at the layers where the prompt has columns. Holds the attention
    weights (H, T, T) of all these layers at once."""
    text = torch.tensor([ids], device=model.embeddings.device)
    plain: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    changes: dict[int, tuple[Tensor, Tensor]] = {}

    def keep_plain(i: int, w: Tensor) -> None:
        if past.keys[i] is not None:
            plain[i] = w[0]

    def keep_prompted(i: int, w: Tensor) -> None:
        if past.keys[i] is not None:
            weights[i] = w[0]
            n = past.keys[i].shape[2]
            # Popped, so that no more than one pass's weights of all layers are held.
            changes[i] = _changes(w[0][..., n:], plain.pop(i))

    # The same text without the prompt and with it.
    model(text, weights=keep_plain)
    _, full = model(text, past, weights=keep_prompted)

    effects = {}
    for i, w in weights.items():
        # The prompt's columns stand first. Several heads attend to one key/value head.
        n = past.keys[i].shape[2]
        group = len(w) // full.values[i].shape[1]
        values = full.values[i][0].repeat_interleave(group, dim=0).float()  # (H, n + T, hd)

        # What attention adds is a sum over columns: those of the prompt, and those of the text.
        heads = w[..., :n] @ values[:, :n]
        everything = heads + w[..., n:] @ values[:, n:]
        output = _projected(model, i, heads)
        bias = output.norm(dim=1).mean() / _projected(model, i, everything).norm(dim=1).mean()
        mass = w[..., :n].sum(dim=-1).mean()
        effects[i] = Effect(mass, *changes[i], bias, heads, output)
    return effects


def _changes(w: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
    """Attention weights on content (H, T, T) with a prompt, and without one -> the largest
    difference between the two distributions, and their mean total variation."""
    difference = (w / w.sum(dim=-1, keepdim=True) - plain).abs()
    return difference.max(), difference.sum(dim=-1).mean() / 2


def _projected(model: llama.Llama, layer: int, heads: Tensor) -> Tensor:
    """What heads (H, T, hd) add to the layer's output (T, D), in fp32."""
    weight = model.model.layers[layer].self_attn.o_proj.weight.float()
    return heads.transpose(0, 1).flatten(1) @ weight.T


def _summary(effects: list[Effect]) -> dict[str, float]:
    """A layer's numbers over all texts."""
    whole = torch.cat([effect.output for effect in effects])
    heads = torch.cat([effect.heads for effect in effects], dim=1)
    means = {key: torch.stack([getattr(effect, key) for effect in effects]).mean().item()
             for key in ("mass", "shift", "bias")}
    content = max(effect.content.item() for effect in effects)
    return {"mass": means["mass"], "content": content, "shift": means["shift"],
            "bias": means["bias"], "one": _one_direction(whole).item(),
            "one_head": _one_direction(heads).mean().item()}


def _one_direction(x: Tensor) -> Tensor:
    """The share of the sum of squares of x (..., N, D) that lies in one direction (...)."""
    squares = torch.linalg.svdvals(x) ** 2
    return squares[..., 0] / squares.sum(dim=-1)


# --------------------------------------------------------------------------------------------------
# the command


def command_attention(given: dict) -> None:
    options = from_flags(AttentionOptions, given)
    opened = open_run(options.run, given)
    run, settings = opened.run, opened.settings
    if settings.prompt.place != "before":
        raise UserError(f"{run.path}: its prompt stands inside the texts (--place "
                        f"{settings.prompt.place}), and what is measured is one before them")
    examples = sample_topics(evaluation_examples(settings.data), options.limit)
    questions = encode(examples, opened.vocabulary, opened.max_length, "evaluation")

    # Questions are run without their answers.
    with torch.no_grad():
        past = opened.prompt.past(opened.model)
        asked = [questions.row(i).question for i in range(len(questions))]
        rows = measure_attention(opened.model, past, asked)

    # A posterior of several prompts has no Past of its own, only the one that stands for it has.
    whose = ""
    if settings.train.posterior != "point":
        whose = f" The {settings.train.representative} of the {settings.train.posterior} posterior."
    figure = "figures/attention.svg"
    caption = describe(opened, len(questions), rows[0][1]["content"]) + whose
    run.write(figure, pictures.attention(rows, caption).encode())
    if options.json:
        show(json.dumps({"run": str(run.path), "step": run.step, "attention": dict(rows)}))
    else:
        show(f"{run.title}, {counted(len(questions), 'question')}.{whose}\n\n{table(rows, TITLES)}")
    say(str(run.path / figure))


def describe(opened: OpenRun, questions: int, content: float) -> str:
    """The caption of the figure. content: of the first layer where the prompt has columns."""
    settings = opened.settings
    return (f"{opened.run.title}: {settings.prompt.method}, prior {settings.prior_name}, seed "
            f"{settings.seed}, {counted(settings.train.steps, 'step')} on "
            f"{spec_name(settings.data.data)}, model {Path(settings.model.model).name}; "
            f"{counted(questions, 'question')}. At the first layer with prompt columns the "
            f"content's own shares differ by at most {content:.1g}.")
