"""What a prompt costs on text that it was not trained for: the loss on plain prose with the prompt
in front, beside that without.

    prose = read_prose(settings.data, loaded, 512)                     # --forget text:PATH
    forgetting(loaded, settings, {"trained": [prompt]}, prose)["trained"]["forgotten"]   # nats

Every token of a text but its first is scored, as without BOS nothing predicts that one. The same
tokens are scored under every prompt, so the difference is paired by text.
"""

from __future__ import annotations

from functools import partial

import numpy as np

import data
import llama
from lab import statistics
from lab.batches import by_question, grouped, losses_and_tokens
from lab.console import UserError
from lab.folder import Run
from lab.inputs import LoadedModel, Questions, parse_spec, plain_prompts
from lab.settings import DataSettings, Settings

SPLIT = "forgetting"  # of a run's log


class Prose(Questions):
    """Texts, as rows whose answer is all of the text but its first token."""

    unit = "texts"

    def _make_row(self, i: int) -> data.Row:
        text = self.examples[i].context[:data.LONGEST_TOKENISED]
        ids, first = self.vocabulary.encode_at(self.beginning + text, len(self.beginning))
        ids = ids[:first + self.max_length]
        # Rows of one beginning share it; the text itself is none that others could share.
        return data.Row(ids, first + 1, ids, "", 0)


def check_separator(settings: Settings) -> None:
    """Raises UserError for text prompts that the tokens of a text may merge with. Early runs, which
    have such, go on with their settings."""
    separator = settings.prior.separator
    if settings.data.forget and settings.prior.text and separator is not None \
            and not separator.endswith("\n"):
        raise UserError(f"--separator {separator!r}: behind it a text of --forget may begin with "
                        "other tokens than without a text prompt: give one that ends in a line "
                        "break (\\n), or leave --forget out")


def read_prose(settings: DataSettings, loaded: LoadedModel, max_length: int) -> Prose | None:
    """The first --eval-limit texts of --forget, cut to max_length tokens; None without --forget.
    Raises UserError for what is no prose."""
    spec = settings.forget
    if spec is None:
        return None
    kind, path = parse_spec(spec, 1)
    if kind != "text":
        raise UserError(f"--forget {spec}: forgetting is measured on prose: give text:PATH, or "
                        "text for the bundled one")
    texts = data.read(kind, path, settings.eval_limit or None)
    encoded = loaded.vocabulary.encode_batch([e.context[:2000] for e in texts])
    several = [text for text, ids in zip(texts, encoded) if len(ids) > 2]
    if len(several) < 2:
        if settings.eval_limit == 1:
            raise UserError("--forget takes 2 texts or more: give a larger --eval-limit (--limit "
                            "of eval)")
        raise UserError(f"--forget {spec}: texts of several tokens in it: {len(several)}, and "
                        "forgetting takes 2 or more, parted by empty lines: give other prose")
    return Prose(several, loaded.vocabulary, max_length, spec)


def forgetting(loaded: LoadedModel, settings: Settings, entries: dict[str, list[llama.Prompt]],
               prose: Prose) -> dict[str, dict[str, float]]:
    """{label: numbers} of no prompt, the text prompts, and entries {label: prompts} (the
    probabilities of several are averaged). prose: nats a token. forgotten: that less the loss
    without a prompt. Each with its standard error, in which texts are the independent units."""
    def scored(name: str, prompts: list, texts: Questions) -> list[np.ndarray]:
        results = by_question(loaded.model, prompts, settings.prompt.place, settings.data,
                              settings.train.shard, texts, f"{name}, prose",
                              partial(losses_and_tokens, loaded.model))
        return list(map(np.array, results))  # (texts, 2): loss, tokens

    losses = {}
    for plain in plain_prompts(loaded, settings.prior, prose):
        losses[plain.name], = scored(plain.name, [[plain.past]], plain.questions)
    for name, labels in grouped(entries):
        of_labels = scored(name, [entries[label] for label in labels], prose)
        losses |= zip(labels, of_labels)

    without, texts, numbers = losses["no prompt"][:, 0], np.arange(len(prose)), {}
    for label, (loss, tokens) in ((label, x.T) for label, x in losses.items()):
        numbers[label] = _ratio("prose", loss, tokens, texts)
        if label != "no prompt":
            numbers[label] |= _ratio("forgotten", loss - without, tokens, texts)
    return numbers


def _ratio(key: str, x: np.ndarray, tokens: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    return {key: float(x.sum() / tokens.sum()),
            f"{key}_se": statistics.ratio_error(x, tokens, texts)}


def log_forgetting(run: Run, settings: Settings, loaded: LoadedModel, prose: Prose,
                   prompts: list[llama.Prompt], step: int) -> None:
    """Log what training has forgotten: a line without a prompt, one for each text prompt, and one
    for the trained prompt, which alone has a step."""
    *plain, trained = forgetting(loaded, settings, {"trained": prompts}, prose).values()
    for numbers in plain:
        run.log({"split": SPLIT, **numbers})
    run.log({"step": step, "split": SPLIT, **trained})
