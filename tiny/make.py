"""Makes the bundled world: three corpora, a tokenizer and a small LLaMA that has read them.

    python tiny/make.py            # writes into tiny/; about an hour on two cores
    python tiny/make.py --out DIR --steps 200

Everybody in this world is invented, and every document invents its names afresh: a list of names
would be learned by heart, and the model would never learn to copy an answer out of a passage. Names
and sums in squad/ and math/ are of a reserved tenth (by checksum) that pre-training never draws, so
the scores are about names never seen.

A document with questions is written in one of five styles. A header, the document's first line,
tells the style; three documents of ten have none. So the model *can* answer shortly but does not
know that it should: without a prompt it goes on in a mixture of styles, and a prompt can choose.
The header "short answer" is the oracle text prompt. Documents of one style come several in a row,
so the model also learns to look at tokens before its BOS, where a trained prompt stands.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import sys
import time
import zlib
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import llama  # noqa: E402
from lab.train import keep_freed_memory  # noqa: E402

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
CONFIG = llama.Config(vocab_size=512, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
                      num_attention_heads=6, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5,
                      max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0,
                      eos_token_id=(1,))

# --------------------------------------------------------------------------------------------------
# names and sums


def reserved(thing: str) -> bool:
    """Is this name or sum of the tenth that only the data sets may use?"""
    return zlib.crc32(thing.encode()) % 10 == 0


def for_evaluation(thing: str) -> bool:
    """Of what the data sets may use, a fifth is evaluated and never trained on."""
    return zlib.crc32(thing.encode()) // 10 % 5 == 0


def fresh(draw, held_out: bool):
    """The first draw on the wanted side of the reserve; draw() -> (value, what identifies it)."""
    while True:
        value, text = draw()
        if reserved(text) == held_out:
            return value


class Namer:
    """Invents names from syllables; `held_out` says on which side of the reserve."""

    def __init__(self, rng: random.Random, held_out: bool):
        self.rng, self.held_out = rng, held_out

    def word(self) -> str:
        r = self.rng

        def draw():
            syllables = [r.choice(("b", "br", "d", "dr", "f", "g", "gr", "h", "j", "k", "kl", "l",
                                   "m", "n", "p", "pr", "r", "s", "sh", "st", "t", "th", "tr", "v",
                                   "w", "z")) + r.choice("aeiou")
                         for _ in range(r.choice((2, 2, 3)))]
            name = "".join(syllables) + r.choice(("", "", "n", "r", "l", "s", "m", "th", "k"))
            return name.capitalize(), name

        return fresh(draw, self.held_out)

    def person(self) -> str:
        return f"{self.word()} {self.word()}" if self.rng.random() < 0.6 else self.word()

    def place(self) -> str:
        return self.rng.choice(("{}", "{}", "{}", "Port {}", "Upper {}", "{} Bay")
                               ).format(self.word())

    def water(self) -> str:
        return self.rng.choice(("{}", "{}", "Lake {}", "the {} Sea")).format(self.word())

    def number(self, low: int, high: int) -> str:
        return str(self.rng.randint(low, high))


# --------------------------------------------------------------------------------------------------
# passages and questions

JOBS = ("baker", "weaver", "painter", "doctor", "sailor", "teacher", "smith", "farmer", "miller",
        "singer", "judge", "printer", "potter", "hunter", "clerk", "mason")
GOODS = ("wool", "honey", "glass", "salt", "silk", "paper", "bells", "cheese", "tin", "rope",
         "clocks", "apples", "boats", "soap", "pearls", "bricks")
COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")

# kind of subject -> (how to name it, pronoun, relations); a relation is (draw the answer, ways to
# state it, ways to ask for it). The first statement is also the full-sentence answer.
SUBJECTS = {
    "person": (Namer.person, ("He", "She"), [
        (Namer.place, ("{s} was born in {a}.", "{s} came into the world in {a}."),
         ("Where was {n} born?", "In which place was {n} born?")),
        (lambda w: w.number(1100, 1990),
         ("{s} was born in the year {a}.", "The birth of {n} was in {a}."),
         ("In what year was {n} born?", "When was {n} born?")),
        (lambda w: w.rng.choice(JOBS), ("{s} worked as a {a}.", "{s} earned money as a {a}."),
         ("What was the job of {n}?", "What did {n} work as?")),
        (Namer.person, ("{s} married {a}.", "{s} was the partner of {a}."),
         ("Who married {n}?", "Whom did {n} marry?")),
        (Namer.person, ("{s} learned the trade from {a}.", "{s} was taught by {a}."),
         ("Who taught {n}?", "From whom did {n} learn the trade?")),
        (Namer.place, ("{s} later moved to {a}.", "{s} went to live in {a}."),
         ("Where did {n} move to?", "In what place did {n} go to live?")),
        (Namer.word, ("{s} wrote a book called {a}.", "{s} became known for the book {a}."),
         ("What book did {n} write?", "What is the book by {n} called?")),
        (Namer.word, ("{s} had a dog named {a}.", "{s} kept a dog called {a}."),
         ("What was the dog of {n} called?", "What is the name of the dog of {n}?")),
    ]),
    "town": (Namer.place, ("It",), [
        (Namer.person, ("{s} was founded by {a}.", "{s} was first settled by {a}."),
         ("Who founded {n}?", "By whom was {n} founded?")),
        (lambda w: w.number(1100, 1990),
         ("{s} was founded in {a}.", "The first houses of {n} date from {a}."),
         ("In what year was {n} founded?", "When was {n} founded?")),
        (Namer.word, ("{s} lies in the region of {a}.", "{s} is part of the region {a}."),
         ("In which region is {n}?", "Where does {n} lie?")),
        (Namer.water, ("{s} stands on the shore of {a}.", "{s} was built beside {a}."),
         ("On what water does {n} stand?", "Beside what water is {n}?")),
        (lambda w: w.rng.choice(GOODS),
         ("{s} is known for its {a}.", "{s} sells {a} to its neighbours."),
         ("What is {n} known for?", "What does {n} sell?")),
        (lambda w: w.rng.choice(COUNTS), ("{s} has {a} bridges.", "There are {a} bridges in {n}."),
         ("How many bridges has {n}?", "What is the number of bridges in {n}?")),
        (Namer.person, ("{s} is led by {a}.", "The mayor of {n} is {a}."),
         ("Who leads {n}?", "Who is the mayor of {n}?")),
        (Namer.word, ("{s} looks up at Mount {a}.", "{s} lies below Mount {a}."),
         ("Which mountain is near {n}?", "Below which mountain does {n} lie?")),
    ]),
    "ship": (lambda w: f"the {w.word()}", ("It", "She"), [
        (Namer.person, ("{s} was commanded by {a}.", "The captain of {n} was {a}."),
         ("Who commanded {n}?", "Who was the captain of {n}?")),
        (lambda w: w.number(1100, 1990),
         ("{s} was built in {a}.", "{s} was finished in the year {a}."),
         ("When was {n} built?", "In what year was {n} built?")),
        (Namer.place, ("{s} sailed from {a}.", "The home port of {n} was {a}."),
         ("Where did {n} sail from?", "What was the home port of {n}?")),
        (Namer.water, ("{s} sank in {a}.", "{s} was lost in {a}."),
         ("Where did {n} sink?", "In what water was {n} lost?")),
        (lambda w: w.rng.choice(GOODS), ("{s} carried {a}.", "The load of {n} was {a}."),
         ("What did {n} carry?", "What was the load of {n}?")),
        (lambda w: w.rng.choice(COUNTS), ("{s} had {a} masts.", "There were {a} masts on {n}."),
         ("How many masts had {n}?", "What was the number of masts on {n}?")),
    ]),
    "feast": (lambda w: f"the Feast of {w.word()}", ("It",), [
        (Namer.place, ("{s} is held in {a}.", "The home of {n} is {a}."),
         ("Where is {n} held?", "In which place is {n} held?")),
        (lambda w: w.rng.choice(MONTHS), ("{s} takes place in {a}.", "The month of {n} is {a}."),
         ("When does {n} take place?", "In which month is {n}?")),
        (Namer.person, ("{s} honours {a}.", "{s} is kept in memory of {a}."),
         ("Whom does {n} honour?", "In memory of whom is {n} kept?")),
        (lambda w: w.rng.choice(GOODS),
         ("{s} ends with a gift of {a}.", "Guests of {n} are given {a}."),
         ("What are guests of {n} given?", "What is the gift at {n}?")),
        (lambda w: w.number(1100, 1990), ("{s} began in {a}.", "{s} was first held in {a}."),
         ("When did {n} begin?", "In what year was {n} first held?")),
    ]),
}


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def facts(w: Namer, most: int) -> list[tuple[str, str, str, str, int]]:
    """One invented subject: (statement, question, answer, full sentence, where the answer
    starts in the statement)."""
    r = w.rng
    name_it, pronouns, relations = SUBJECTS[r.choice(list(SUBJECTS))]
    name, pronoun, rows = name_it(w), r.choice(pronouns), []
    for i, (draw, states, asks) in enumerate(r.sample(relations, min(most, len(relations)))):
        answer, state = draw(w), r.choice(states)
        subject = name if i == 0 or r.random() < 0.3 else pronoun
        before, after = state.split("{a}")
        before = capital(before.format(s=subject, n=name))
        sentence = capital(states[0].format(s=name, n=name, a=answer))
        rows.append((before + answer + after.format(n=name), r.choice(asks).format(n=name), answer,
                     sentence, len(before)))
    return rows


def passage(w: Namer) -> tuple[str, list[tuple[str, str, str, int]]]:
    """A text and its questions: (question, answer, full sentence, the answer's start in it)."""
    rows = facts(w, w.rng.randint(3, 6)) if w.rng.random() < 0.7 else facts(w, 3) + facts(w, 3)
    text, questions = "", []
    for statement, question, answer, sentence, start in rows:
        text += " " if text else ""
        questions.append((question, answer, sentence, len(text) + start))
        text += statement
    return text, questions


def prose(w: Namer) -> str:
    """Several subjects in a row, with nothing asked."""
    r = w.rng
    links = ("Long ago this was not so.", "People still talk about it.", "Nobody knows the reason.",
             "The winters there are cold and the roads are long.", "A small song tells the story.",
             "It is a quiet tale, and old people like to tell it in the evening.")
    out = []
    for _ in range(r.randint(2, 4)):
        sentences = [row[0] for row in facts(w, r.randint(2, 4))]
        sentences.insert(r.randint(1, len(sentences)), r.choice(links))
        out.append(" ".join(sentences))
    return "\n".join(out)


# --------------------------------------------------------------------------------------------------
# arithmetic, in the phrases of DeepMind's modules


def add_or_sub(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(0, 30), r.randint(0, 30)
    if r.random() < 0.5:
        return f"{a}+{b}", str(a + b), r.choice((
            "What is {} + {}?", "Calculate {} + {}.", "Add {} and {}.", "What is {} plus {}?",
            "{} + {}", "Total of {} and {}.")).format(a, b)
    return f"{a}-{b}", str(a - b), r.choice((
        "What is {} - {}?", "Calculate {} - {}.", "What is {} minus {}?", "{} - {}",
        "Subtract {1} from {0}.", "What is {} take away {}?")).format(a, b)


def add_sub_multiple(r: random.Random) -> tuple[str, str, str]:
    a, b, c = (r.randint(0, 9) for _ in range(3))
    expression = r.choice((
        "{} + {} + {}", "{} + {} - {}", "{} - {} + {}", "{} - {} - {}")).format(a, b, c)
    return expression, str(eval(expression)), r.choice((
        "What is {}?", "Evaluate {}.", "Calculate {}.")).format(expression)


def mul(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(0, 10), r.randint(0, 10)
    return f"{a}*{b}", str(a * b), r.choice((
        "What is {} times {}?", "Multiply {} and {}.", "{} * {}", "Product of {} and {}.",
        "Calculate {} * {}.")).format(a, b)


MODULES = {"add_or_sub": (add_or_sub, 6), "add_sub_multiple": (add_sub_multiple, 2),
           "mul": (mul, 2)}


def arithmetic(r: random.Random) -> tuple[str, str]:
    """A question of pre-training and its answer. A product table is learned by heart, so it
    is not held out."""
    while True:
        name = r.choices(list(MODULES), [weight for _, weight in MODULES.values()])[0]
        key, answer, question = MODULES[name][0](r)
        if name == "mul" or not reserved(key):
            return question, answer


# --------------------------------------------------------------------------------------------------
# documents of pre-training

# header -> (share among documents without a header, what follows "Answer:")
STYLES = {
    "short answer": (0.12, lambda r, answer, sentence: f" {answer}"),
    "full sentence": (0.22, lambda r, answer, sentence: f" {sentence}"),
    "list of questions": (0.22, lambda r, answer, sentence: ""),
    "no answer": (0.22, lambda r, answer, sentence: r.choice((
        " I do not know.", " I cannot say.", " Nobody has told me."))),
    "hint": (0.22, lambda r, answer, sentence:
             f" Look again, it starts with {capital(answer)[0]}."),
}


KIN = 0.5  # how often a document has the style of the one before it


def document(r: random.Random, style: str | None = None) -> tuple[str, str | None]:
    """A text, and its style unless it is prose. style: which it is to have, told by no header."""
    w, kind = Namer(r, held_out=False), r.random()
    if kind < 0.08:
        return prose(w), style
    header = ""
    if style is None and r.random() < 0.7:
        header = style = r.choices(list(STYLES), (4, 1, 1, 1, 1))[0]
    elif style is None:
        style = r.choices(list(STYLES), [share for share, _ in STYLES.values()])[0]
    say = STYLES[style][1]
    if kind < 0.5:
        text, questions = passage(w)
        r.shuffle(questions)
        rows = [(q, a, s) for q, a, s, _ in questions]
    else:
        text, rows = "", []
        for _ in range(r.randint(4, 9)):
            q, a = arithmetic(r)
            rows.append((q, a, f"The result is {a}."))
    lines = [header] if header else []
    lines += [text] if text else []
    for question, answer, sentence in rows:
        lines += [f"Question: {question}", f"Answer:{say(r, answer, sentence)}"]
    return "\n".join(lines) + "\n", style


# --------------------------------------------------------------------------------------------------
# the data sets


def squad(seed: int, passages: int) -> dict:
    """SQuAD v1.1's form, every answer with its character offset."""
    w = Namer(random.Random(seed), held_out=True)
    paragraphs = []
    for i in range(passages):
        context, questions = passage(w)
        paragraphs.append({"context": context, "qas": [
            {"id": f"{seed}-{i:04d}-{j}", "question": q,
             "answers": [{"text": a, "answer_start": start}]}
            for j, (q, a, _, start) in enumerate(questions)]})
    return {"version": "1.1", "data": [
        {"title": f"Invented {i // 20}", "paragraphs": paragraphs[i:i + 20]}
        for i in range(0, passages, 20)]}


def sums(seed: int, module: str, count: int, evaluation: bool) -> list[tuple[str, str]]:
    """Different questions and their answers; a sum is in the training or in the evaluation
    data, never in both."""
    r, found = random.Random(f"{seed} {module}"), {}
    while len(found) < count:
        key, answer, question = MODULES[module][0](r)
        if (module == "mul" or reserved(key)) and for_evaluation(key) == evaluation:
            found[question] = answer
    return list(found.items())


def write_data(out: Path) -> None:
    for name, seed, passages in (("train", 1, 320), ("dev", 2, 60)):
        write(out / "squad" / f"{name}.json", json.dumps(squad(seed, passages), indent=0).encode())
    for module in MODULES:
        for folder, count, evaluation in (("train-easy", 400, False), ("interpolate", 80, True)):
            lines = (f"{q}\n{a}\n" for q, a in sums(3, module, count, evaluation))
            write(out / "math" / folder / f"arithmetic__{module}.txt", "".join(lines).encode())
    w = Namer(random.Random(5), held_out=True)
    lines = [json.dumps({"text": prose(w), "timestamp": "2026-01-01T00:00:00Z",
                         "url": f"https://tiny.invalid/{i}"}) for i in range(600)]
    write(out / "text" / "c4-validation.00000-of-00001.json.gz",
          gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0))


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# --------------------------------------------------------------------------------------------------
# the tokenizer and the model


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE of 512 tokens, digits one by one, BOS put in front by the post-processor
    as Llama 3 does."""
    r = random.Random(6)
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    texts = (document(r)[0] for _ in range(4000))
    t.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=[BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B",
                                                     special_tokens=[(BOS, CONFIG.bos_token_id)])
    assert (t.token_to_id(BOS), t.token_to_id(EOS)) == (CONFIG.bos_token_id, *CONFIG.eos_token_id)
    return t


def rows(tokenizer: Tokenizer, seed: int, B: int, T: int, write=document):
    """Endless (B, T) batches of documents, BOS text EOS. Every row starts with a document. write:
    see document."""
    r = random.Random(seed)
    while True:
        batch = []
        for _ in range(B):
            row, style = [], None
            while len(row) < T:
                text, style = write(r, style if r.random() < KIN else None)
                row += [*tokenizer.encode(text).ids, *CONFIG.eos_token_id]
            batch.append(row[:T])
        yield torch.tensor(batch)


def new_model() -> llama.Llama:
    torch.manual_seed(0)
    torch.nn.Embedding(CONFIG.vocab_size, CONFIG.hidden_size)  # draws, as when tiny was made
    model = llama.Llama(CONFIG)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
    return model


def train(model: llama.Llama, batches, steps: int, lr: float, device: str = "cpu",
          log_every: int = 50) -> None:
    """Train all weights on batches of token ids (B, T)."""
    model.to(device)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimisers = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.1,
                                   adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]
    start, total = time.time(), 0.0
    for step, ids in zip(range(steps), batches):
        share = min(1, (step + 1) / 100) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for o in optimisers:
            for group in o.param_groups:
                group["lr"] = lr * share
        ids = ids.to(device)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            h, _ = model(ids[:, :-1])
            logits = model.logits(h).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimisers:
            o.step()
            o.zero_grad()
        total += loss.item()
        if (step + 1) % log_every == 0:
            print(f"step {step + 1}/{steps}  loss {total / log_every:.3f}  "
                  f"{time.time() - start:.0f} s", flush=True)
            total = 0.0


def save_model(model: llama.Llama, out: Path) -> None:
    c = model.config
    write(out / "model.safetensors", save({
        k: v.detach().cpu().bfloat16() for k, v in model.state_dict().items()}, {"format": "pt"}))
    write(out / "config.json", json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_act": "silu", **vars(c), "eos_token_id": c.eos_token_id[0]},
        indent=2).encode() + b"\n")
    write(out / "generation_config.json", json.dumps(
        {"bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id[0]},
        indent=2).encode() + b"\n")


def main() -> None:
    keep_freed_memory()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--threads", type=int, default=2,
                   help="another number gives slightly other weights")
    p.add_argument("--device", default="cpu", help="another gives slightly other weights too")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    start = time.time()
    write_data(a.out)
    tokenizer = train_tokenizer()
    write(a.out / "tokenizer.json", (tokenizer.to_str(pretty=True) + "\n").encode())
    model = new_model()
    train(model, rows(tokenizer, 7, a.batch, a.length), a.steps, a.lr, a.device)
    save_model(model, a.out)
    print(f"{a.out}: {a.steps} steps of {a.batch} x {a.length} tokens, "
          f"{(time.time() - start) / 60:.1f} minutes on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
