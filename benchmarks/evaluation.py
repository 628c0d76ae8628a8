"""Evaluation, loss and greedy answers, ours against PEFT's on the same weights and questions.

    python benchmarks/evaluation.py                                # 135M shape, bundled SQuAD
    python benchmarks/evaluation.py --data squad:dev-v1.1.json     # real SQuAD
    python benchmarks/evaluation.py --model smollm2 --data squad:dev-v1.1.json    # a real model

A random model never ends a line, so a random share of the vocabulary, --stop of it, ends an answer:
answers are then about as long as SQuAD's. Our evaluation decodes only where a model errs, so it is
timed on a model that answers nothing right (SQuAD's answers) and on one that answers all right (its
own).

Before anything is timed our loss and our answers, token by token, are compared in fp32 with PEFT's,
asked one question at a time. PEFT is timed as its users run it, a forward for the loss and generate
for a batch padded on the left. The latter does not shift positions by the padding (peft 0.21.2 with
transformers 5), so many of its answers are then others, which is counted and not held against its
time.

With --model DIR a real model answers --questions of the data under 20 rows of its vocabulary, after
a text of --text-tokens tokens, and with neither, whatever share of answers is right. Ours takes
batches of 16, as `eval` does, PEFT those of --peft-batches in which one turn was fastest.
"""

from __future__ import annotations

import statistics
import time

import torch

import peers
import data
import llama
from lab.inputs import parse_spec
from lab.loss import Text, answers, begin

CHECKED = 2  # questions of a real model that are compared before it is timed


def ours(model: llama.Llama, prompt: llama.Prompt, rows: list[data.Row], stop: set[int],
         max_new: int):
    """Loss (nats a token) and answers."""
    batch = data.collate(rows).to(model.embeddings.device)
    with torch.no_grad():
        past = model.extend(batch.shared, prompt.past(model))
    result = answers(model, [past], batch, max_new, stop)
    return sum(result.loss) / sum(result.tokens), result.ids


def their_loss(model, rows: list[data.Row]):
    ids = llama.pad([r.ids for r in rows], value=0).to(model.device)
    mask = llama.pad([[1] * len(r.ids) for r in rows], value=0).to(model.device)
    labels = llama.pad([[-100] * r.start + r.ids[r.start:] for r in rows], value=-100)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, labels=labels.to(model.device),
                     use_cache=False).loss


def their_answers(model, rows: list[data.Row], stop: set[int], max_new: int) -> list[list[int]]:
    T = max(len(r.question) for r in rows)
    device = model.device
    ids = torch.tensor([[0] * (T - len(r.question)) + r.question for r in rows], device=device)
    mask = torch.tensor([[0] * (T - len(r.question)) + [1] * len(r.question) for r in rows],
                        device=device)
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new,
                             do_sample=False, eos_token_id=sorted(stop), pad_token_id=0)
    answers = out[:, -(out.shape[1] - T):].tolist() if out.shape[1] > T else []
    ends = [next((i + 1 for i, t in enumerate(a) if t in stop), len(a)) for a in answers]
    return [a[:end] for a, end in zip(answers, ends)]


def ours_of_all(model: llama.Llama, start, rows: list[data.Row], stop: set[int], max_new: int):
    """Loss (nats a token) and answers of all rows, as `eval` makes them. start: see lab.loss.begin,
    or a Prompt."""
    decoding, results = llama.Decoding(model, max_new, stop), []
    with torch.no_grad():
        if isinstance(start, llama.Prompt):
            start = start.past(model)
        for i in range(0, len(rows), 16):
            past, batch = begin(model, data.collate(rows[i:i + 16]), start)
            results.append(answers(model, [past], batch, max_new, stop, decoding=decoding))
    decoding.run()
    loss = sum(sum(r.loss) for r in results) / sum(sum(r.tokens) for r in results)
    return loss, [ids for r in results for ids in r.ids]


def checked(mine, theirs, rows: list[data.Row], stop: set[int], max_new: int
            ) -> tuple[float, list[list[int]]]:
    """PEFT's loss (nats a token) and answers, of one question at a time, which ours, mine, equal in
    fp32. Raises AssertionError if they do not."""
    loss, said = mine
    tokens = torch.tensor([len(row.ids) - row.start for row in rows])
    losses = torch.stack([their_loss(theirs, [row]) for row in rows]).cpu()
    other = float((losses * tokens).sum() / tokens.sum())
    alone = [their_answers(theirs, [row], stop, max_new)[0] for row in rows]
    assert said == alone, f"answers differ: {said} and {alone}"
    assert abs(loss - other) <= 1e-5 * other, f"loss {loss}, PEFT's {other}"
    return other, alone


def cpu_seconds(call):
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def real(a) -> None:
    """The comparison on a model folder. Seconds are CPU seconds of the process."""
    from transformers import AutoModelForCausalLM

    model = llama.load(a.model, "float32")
    # PEFT wraps a model for good, so the model under rows is another one
    peer, other = (AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
                   for _ in range(2))
    vocabulary = data.Vocabulary(a.model, bos=model.config.bos_token_id)
    examples = [e for e in data.read(*parse_spec(a.data, 0)) if e.answers]
    text = vocabulary.encode("\n".join(dict.fromkeys(e.context for e in reversed(examples))))
    text = vocabulary.tokenizer.decode(text[:a.text_tokens]) + "\n"
    ids = torch.tensor(vocabulary.encode(text))
    g = torch.Generator().manual_seed(a.seed)
    rows = model.embeddings[torch.randint(len(model.embeddings), (a.tokens,), generator=g)].clone()
    tuned = peers.peft_model(other, rows).eval()
    plain, after_text = ([data.encode(e, vocabulary, 1024, t) for e in examples[:a.questions]]
                         for t in ("", text))
    print(f"{peers.machine(a)}\n{a.model}, {a.dtype}; {a.questions} questions of {a.data}; a text "
          f"of {len(ids)} tokens, a prompt of {a.tokens} rows")

    def kinds():
        with torch.no_grad():
            past = model.extend(ids[None])
        return (("no prompt", model.empty(), peer, plain),
                ("a text", Text(ids, past), peer, after_text),
                ("a prompt", llama.Prompt({0: rows}), tuned, plain))

    for name, start, theirs, asked in kinds():
        few = asked[:CHECKED]
        mine = ours_of_all(model, start, few, vocabulary.stop, a.max_new)
        loss, _ = checked(mine, theirs, few, vocabulary.stop, a.max_new)
        print(f"{name}, fp32: loss {mine[0]:.6f}, PEFT's {loss:.6f}; the same answers to "
              f"{len(few)} questions", flush=True)
    for module in (model, peer, tuned):
        module.to(getattr(torch, a.dtype))
    for name, start, theirs, asked in kinds():
        compare(a, name, model, start, theirs, asked, vocabulary.stop)


def compare(a, name: str, model: llama.Llama, start, theirs, rows: list[data.Row],
            stop: set[int]) -> None:
    """Print questions a second of both, medians of turns with PEFT's best batch size."""
    def own_turn():
        return cpu_seconds(lambda: ours_of_all(model, start, rows, stop, a.max_new))

    def their_turn(size: int) -> tuple[float, float]:
        parts = [rows[i:i + size] for i in range(0, len(rows), size)]
        forward, _ = cpu_seconds(lambda: [their_loss(theirs, part) for part in parts])
        generate, _ = cpu_seconds(
            lambda: [their_answers(theirs, part, stop, a.max_new) for part in parts])
        return forward + generate, generate

    _, (_, said) = own_turn()  # a warm-up
    sizes = map(int, a.peft_batches.split(","))
    size = min(sizes, key=their_turn)
    times = {"ours": [], "PEFT": [], "generate": []}
    for _ in range(a.repeats):
        times["ours"].append(own_turn()[0])
        for key, seconds in zip(("PEFT", "generate"), their_turn(size)):
            times[key].append(seconds)
    ours_rate, their_rate, generate_rate = (len(rows) / statistics.median(t)
                                            for t in times.values())
    whole, part = (peers.ratio(times, key, "ours") for key in ("PEFT", "generate"))
    print(f"{name}: ours {ours_rate:.2f} questions/s, {sum(map(len, said))} tokens; PEFT, batches "
          f"of {size}: {their_rate:.2f}, of generate alone {generate_rate:.2f}; faster by "
          f"{whole[0]:.1f} ({whole[1]:.1f} to {whole[2]:.1f}), than generate alone by "
          f"{part[0]:.1f}", flush=True)


def main() -> None:
    a = peers.arguments(__doc__.splitlines()[0], batches=(3, "different batches"),
                        stop=(0.2, "share of the vocabulary that ends an answer"),
                        max_new=(32, "most tokens of an answer"),
                        model=("", "a model folder, instead of random weights"),
                        questions=(32, "with --model"), text_tokens=(500, "with --model"),
                        peft_batches=("1,4,16", "with --model: batch sizes that PEFT tries"))
    if a.model:
        return real(a)
    batches = peers.questions(a, a.batches)
    g = torch.Generator().manual_seed(a.seed)
    shape = peers.SHAPES[a.shape][1]
    rows = torch.randn(a.tokens, shape["hidden_size"], generator=g) * 0.02
    stop = set(torch.randperm(shape["vocab_size"], generator=g)[
        :int(a.stop * shape["vocab_size"])].tolist())
    # wider than usual, or a random model only repeats its last token
    peer, model = peers.models(a, "float32", spread=0.04)
    tuned = peers.peft_model(peer, rows.to(a.device)).eval()
    prompt = llama.Prompt({0: rows.to(a.device)})
    print(f"{peers.machine(a)}\n{a.shape} shape, {model.config.num_hidden_layers} layers, "
          f"{a.dtype}; {a.tokens} rows; {a.batches} batches of {a.batch_size} questions of "
          f"{a.data}")
    kinds = {}
    for number, batch in enumerate(batches):
        loss, mine = ours(model, prompt, batch, stop, a.max_new)
        other, alone = checked((loss, mine), tuned, batch, stop, a.max_new)
        right = [row._replace(ids=row.question + answer, start=len(row.question))
                 for row, answer in zip(batch, alone)]
        assert ours(model, prompt, right, stop, a.max_new)[1] == alone
        kinds[f"batch {number + 1}, no answer right"] = batch
        kinds[f"batch {number + 1}, all answers right"] = right
        padded = their_answers(tuned, batch, stop, a.max_new)
        print(f"fp32: loss {loss:.6f}, PEFT's {other:.6f}; the same {sum(map(len, mine))} tokens "
              f"as PEFT one by one, answers of {min(map(len, mine))} to {max(map(len, mine))}; "
              f"PEFT's padded batch changes {sum(x != y for x, y in zip(padded, alone))} of "
              f"{len(batch)} answers, to {sum(map(len, padded))} tokens")
    tuned.to(getattr(torch, a.dtype)), model.to(getattr(torch, a.dtype))
    for name, batch in kinds.items():
        times, _ = peers.take_turns({
            "ours": lambda: ours(model, prompt, batch, stop, a.max_new),
            "PEFT's forward": lambda: their_loss(tuned, batch),
            "PEFT's generate": lambda: their_answers(tuned, batch, stop, a.max_new),
        }, a.repeats, a.device)
        times["PEFT"] = [x + y for x, y in zip(*list(times.values())[1:])]
        whole, part = (peers.ratio(times, key, "ours") for key in ("PEFT", "PEFT's generate"))
        print(f"{name}: " + ", ".join(f"{key} {statistics.median(t):.2f} s"
                                      for key, t in list(times.items())[:3])
              + f"; faster by {whole[0]:.2f} ({whole[1]:.2f} to {whole[2]:.2f}), than generate "
                f"alone by {part[0]:.2f}", flush=True)


if __name__ == "__main__":
    main()
