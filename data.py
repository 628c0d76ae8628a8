"""Question-answering and text data in their published formats, as token rows and batches,
and their scores.

Needs tokenizers, and torch only in `collate`. It reads files and returns values; it never prints or
writes, and knows nothing of models.

    examples = read("squad", "train-v1.1.json")          # [Example(context, question, ...), ...]
    rows = [encode(e, vocabulary, max_length=512) for e in examples]
    batch = collate([rows[i] for i in Order([r.context for r in rows], size=32, seed=0)[step]])
    score(examples[0], "a prediction")                   # {"exact_match": 0.0, "f1": 0.4, ...}
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gzip
import io
import json
import math
import os
import random
import re
import string
import zlib
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

PAD = -1  # an empty place in a batch of token ids
NO_LABEL = -100  # a place whose prediction is not scored
LARGEST = 2**31  # bytes of a file that is read at once
LONGEST = 2**24  # characters of one text
SEEN = 2**20  # of them that are made tokens, of a hundred bytes and more each
EXPANDED = 100  # times its size that a .gz over LONGEST becomes at most; texts become 3 to 10 times


class DataError(ValueError):
    """Data that cannot be used: the file, what was found, what was expected, in one line."""


class Example(NamedTuple):
    id: str
    kind: str  # "squad", "math", "hendrycks" or "text"
    context: str  # "" for arithmetic; the whole text of "text"
    question: str
    answers: tuple[str, ...]  # all that are accepted, the first is trained on; () is unanswerable


# --------------------------------------------------------------------------------------------------
# files


def read(kind: str, path: str, limit: int | None = None) -> list[Example]:
    """All examples of a file, a folder or a glob; `limit` stops reading text, which is streamed."""
    return list(islice(stream(kind, path), limit if kind == "text" else None))


def stream(kind: str, path: str) -> Iterator[Example]:
    """read, one example after the other."""
    reader, empty = READERS[kind][1], True
    for file in files_of(kind, path):
        for example in reader(file):
            empty = False
            yield example
    if empty:
        raise DataError(f"{path}: no examples in it, expected at least one {kind} example: "
                        "choose another file")


def files_of(kind: str, path: str) -> list[Path]:
    """The files that a path stands for: itself, those of its kind in a folder, or a glob's."""
    suffixes, place = READERS[kind][0], Path(path)
    try:
        if place.is_dir():
            files = sorted(p for p in place.rglob("*")
                           if p.name.endswith(suffixes) and p.is_file())
            expected = f"a file ending in {' or '.join(suffixes)} below it"
        else:
            # not glob.glob, whose ** follows links and so may go round for ever
            found = [place] if place.exists() else Path(place.anchor or ".").glob(
                str(place.relative_to(place.anchor)) + "/*" * path.endswith("**"))
            files = sorted(p for p in found if p.is_file() and (
                p == place or not p.name.startswith(".")))  # a pipe would be waited on for ever
            expected = "a file, a folder, or a pattern that matches files"
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be looked at ({e}): check the path") from None
    if not files:
        raise DataError(f"{path}: nothing found, expected {expected}: check the path")
    return files


def read_text(path: str | Path, most: int = LARGEST) -> str:
    """A file of at most `most` bytes, with or without a byte order mark, its line ends \\n."""
    path, raw = Path(path), b""
    try:
        if not path.is_file() and path.exists():  # opening a pipe would wait for ever
            raise DataError(f"{path}: a folder, a pipe or a device, expected a file: check the "
                            "path")
        if path.stat().st_size > most:
            raise DataError(f"{path}: {path.stat().st_size} bytes, and no more than {most} are "
                            "read at once: check the file, or divide it")
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            raise DataError(f"{path} line {line}: a NUL, so this is no text, or UTF-16: convert "
                            "it to UTF-8")
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}): check the path") from None
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8 text ({e.reason}, byte "
                        f"0x{raw[e.start]:02x}): convert it, or check its kind") from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def parse_json(text: str, where: str):
    """A JSON value without halves of surrogate pairs, which are no characters. Whatever is wrong
    is a DataError that begins with `where`."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as e:
        cause = f"half a surrogate pair, \\u{ord(e.object[e.start]):04x}"
    except RecursionError:
        cause = "nested too deep"
    except ValueError as e:
        cause = str(e)
    raise DataError(f"{where}: not JSON ({cause}): fetch the file again, or check its kind")


def read_json(path: str | Path, type_: type = object, most: int = LARGEST):
    """A file's JSON value, of this type."""
    value = parse_json(read_text(path, most), str(path))
    if not isinstance(value, type_):
        raise DataError(f"{path}: holds {type(value).__name__}, expected {type_.__name__}: fetch "
                        "it again")
    return value


def json_lines(text: str, path: str | Path) -> Iterator[tuple[str, dict]]:
    """(where, object) of every line that is not empty."""
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {i}"
            value = parse_json(line, where)
            if not isinstance(value, dict):
                raise DataError(f"{where}: holds {type(value).__name__}, expected an object with "
                                "named fields: check the file's kind")
            yield where, value


def _records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) of a JSON array, JSON lines, or an object of columns."""
    text = read_text(path)
    if "\n" in text.strip() and text.lstrip().split("\n", 1)[0].rstrip().endswith("}") \
            and text.lstrip()[:1] != "[":
        yield from json_lines(text, path)
        return
    rows = parse_json(text, str(path)) if text.strip() else []
    if not isinstance(rows, list):
        if isinstance(rows, dict) and rows and all(isinstance(v, list) for v in rows.values()):
            if len(set(map(len, rows.values()))) > 1:
                raise DataError(f"{path}: its columns differ in length: fetch the file again")
            rows = [dict(zip(rows, values)) for values in zip(*rows.values())]
        rows = rows if isinstance(rows, list) else [rows]
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path} record {i}: found {type(row).__name__}, expected an object "
                            "with named fields: check the file's kind")
        yield f"{path} record {i}", row


def _field(row: dict, key: str, type_: type, where: str):
    if not isinstance(row, dict) or not isinstance(row.get(key), type_):
        found = f"{key!r} is {type(row[key]).__name__}" if isinstance(row, dict) and key in row \
            else f"no {key!r}"
        expected = {str: "a text", list: "a list", dict: "an object"}[type_]
        raise DataError(f"{where}: {found}, expected {expected} of that name: "
                        "check that the file is of this kind")
    if type_ is str and len(row[key]) > LONGEST:
        raise DataError(f"{where}: {key!r} has {len(row[key])} characters, and no more than "
                        f"{LONGEST} make sense: check the file")
    return row[key]


def _squad(path: Path) -> Iterator[Example]:
    """SQuAD v1.1 and v2.0 (nested), or the flattened export with one record a question."""
    text = read_text(path)
    if not text.lstrip().startswith("{") or '"paragraphs"' not in text:
        for where, row in _records(path):
            answers = _field(row, "answers", dict, where)
            yield _question(row, _field(row, "context", str, where),
                            _field(answers, "text", list, where), where)
        return
    for a, article in enumerate(_field(parse_json(text, str(path)), "data", list, str(path))):
        for p, paragraph in enumerate(_field(article, "paragraphs", list, f"{path} article {a}")):
            where = f"{path} article {a} paragraph {p}"
            context = _field(paragraph, "context", str, where)
            for q in _field(paragraph, "qas", list, where):
                golds = [_field(g, "text", str, where) for g in _field(q, "answers", list, where)]
                yield _question(q, context, [] if q.get("is_impossible") else golds, where)


def _question(row: dict, context: str, answers: list, where: str) -> Example:
    if not all(isinstance(a, str) for a in answers):
        raise DataError(f"{where}: an answer is not a text: check that the file is SQuAD")
    return Example(str(row.get("id", where)), "squad", context,
                   _field(row, "question", str, where), tuple(answers))


def _math(path: Path) -> Iterator[Example]:
    """DeepMind mathematics: question and answer on alternating lines, or a JSON export
    of question and answer."""
    if path.suffix in (".json", ".jsonl"):
        for i, (where, row) in enumerate(_records(path)):
            question, answer = (_unbyte(_field(row, key, str, where))
                                for key in ("question", "answer"))
            yield Example(f"{path.parent.name}/{path.stem}-{i}", "math", "", question, (answer,))
        return
    text = read_text(path)
    lines = text.removesuffix("\n").split("\n") if text else []
    if len(lines) % 2:
        raise DataError(f"{path}: {len(lines)} lines, expected a question and an answer in turn, "
                        f"so an even number; line {len(lines)} has no answer: repair the file")
    for i in range(0, len(lines), 2):
        question, answer = lines[i].strip(), lines[i + 1].strip()
        if not question or not answer:
            raise DataError(f"{path} line {i + 1 + bool(question)}: empty, expected a question "
                            "and an answer in turn: repair the file")
        yield Example(f"{path.parent.name}/{path.stem}-{i // 2}", "math", "", question, (answer,))


def _unbyte(text: str) -> str:
    """The export writes the repr of bytes: b'What is 1 + 1?\\n' -> What is 1 + 1?"""
    # one literal and nothing else, for Python's parser runs on it
    if re.fullmatch(r"b'(?:[^'\\\n]|\\.)*+'|b\"(?:[^\"\\\n]|\\.)*+\"", text):
        try:
            text = ast.literal_eval(text).decode()
        except (ValueError, SyntaxError, UnicodeDecodeError):
            pass  # it only looked like one
    return text.strip()


def _hendrycks(path: Path) -> Iterator[Example]:
    """Hendrycks MATH: one problem a JSON file, or records of them; the answer is the last
    \\boxed in the solution."""
    for i, (where, row) in enumerate(_records(path)):
        answer = last_boxed(_field(row, "solution", str, where))
        if answer is None:
            raise DataError(f"{where}: no \\boxed answer in the solution: "
                            "check that the file is Hendrycks MATH")
        yield Example(f"{path.parent.name}/{path.stem}" + (f"-{i}" if i else ""), "hendrycks", "",
                      _field(row, "problem", str, where), (answer,))


def last_boxed(solution: str) -> str | None:
    """The argument of the last \\boxed{..}, \\fbox{..} or \\boxed x, by matching braces."""
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*", solution))
    if not found:
        return None
    rest = solution[found[-1].end():]
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0] or None
    depth = 0
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return rest[1:i]
    return None


def _lines_of_text(path: Path) -> Iterator[Example]:
    """C4 json lines (.json, .jsonl, also .gz), or plain text whose paragraphs are parted
    by empty lines. Streamed."""
    as_json = path.name.removesuffix(".gz").endswith((".json", ".jsonl"))
    paragraph, size, count = [], 0, 0
    for where, line in _lines(path):
        if as_json:
            if line.strip():
                yield Example(f"{path.stem}-{where.rpartition(' ')[2]}", "text",
                              _field(parse_json(line, where), "text", str, where), "", ())
            continue
        if line.strip():
            paragraph.append(line)
            size += len(line)
            if size > LONGEST:
                raise DataError(f"{where}: a paragraph of more than {LONGEST} characters: part it "
                                "by empty lines")
        elif paragraph:
            yield Example(f"{path.stem}-{(count := count + 1)}", "text",
                          "".join(paragraph).strip(), "", ())
            paragraph, size = [], 0
    if paragraph:
        yield Example(f"{path.stem}-{count + 1}", "text", "".join(paragraph).strip(), "", ())


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of a file, .gz or not. No more than a line is held, and no line and no .gz
    may be of any length."""
    packed = path.suffix == ".gz"
    where, number, size = str(path), 0, 0
    try:
        most = max(EXPANDED * path.stat().st_size, LONGEST) if packed else math.inf
        with (gzip.open if packed else open)(path, "rb") as f:
            text = io.TextIOWrapper(f, encoding="utf-8-sig")
            while line := text.readline(LONGEST + 1):
                number, size = number + 1, size + len(line)
                where = f"{path} line {number}"
                if len(line) > LONGEST:
                    raise DataError(f"{where}: longer than {LONGEST} characters: divide it")
                if size > most:
                    raise DataError(f"{where}: {path.stat().st_size} bytes have become {size}, "
                                    "which no text does: do not use this file unless you trust "
                                    "its maker")
                if "\0" in line:
                    raise DataError(f"{where}: a NUL, so this is no text, or UTF-16: convert it to "
                                    "UTF-8")
                yield where, line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read after line {number} ({e}): fetch it "
                        "again") from None


READERS = {  # kind -> (endings looked for in a folder, reader of one file)
    "squad": ((".json", ".jsonl"), _squad),
    "math": ((".txt", ".json", ".jsonl"), _math),
    "hendrycks": ((".json", ".jsonl"), _hendrycks),
    "text": ((".json", ".jsonl", ".json.gz", ".jsonl.gz", ".txt", ".txt.gz"), _lines_of_text),
}


# --------------------------------------------------------------------------------------------------
# tokens


class Vocabulary:
    """A model folder's tokenizer.json, with exactly one BOS in front of every text."""

    path = Path("tokenizer.json")

    def __init__(self, folder: str | Path, bos: int | None, eos: tuple[int, ...] = ()):
        from tokenizers import Tokenizer

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{path}: no such file; a model folder needs its tokenizer.json: "
                            "fetch it")
        text = read_text(path)
        with _unheard(), _blamed(path):
            self.tokenizer = Tokenizer.from_str(text)
            self.tokenizer.no_truncation()  # the file may ask for either; both falsify the text
            self.tokenizer.no_padding()
            added = self.tokenizer.encode("").ids
            # some fail only now
            self.tokenizer.decode(self.tokenizer.encode(string.printable + "\u00fc\u732b\0").ids)
        self.path, self.bos, self.eos = path, bos, eos
        if added and added != [bos] and (bos is not None or len(added) > 1):
            raise DataError(f"{path}: puts tokens {added} around a text and config.json says BOS "
                            f"is {bos}, expected that alone: the two are not of one model; "
                            "fetch both again")

    @functools.cached_property
    def size(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def special(self) -> set[int]:
        """Ids that no text contains: BOS, EOS, reserved places."""
        return {i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}

    @functools.cached_property
    def ordinary(self) -> list[int]:
        """All other ids."""
        return sorted(set(range(self.size)) - self.special)

    @functools.cached_property
    def stop(self) -> set[int]:
        """Ids that end an answer: EOS, and tokens with a line break (byte-level, sentencepiece)."""
        pieces = ((i, self.tokenizer.id_to_token(i) or "") for i in range(self.size))
        return {*self.eos, *(i for i, piece in pieces
                             if "Ċ" in piece or "\n" in piece or piece == "<0x0A>")}

    def encode(self, text: str) -> list[int]:
        with _blamed(self.path):
            ids = self.tokenizer.encode(text).ids
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def encode_at(self, text: str, place: int) -> tuple[list[int], int]:
        """encode, and the index of the first token that begins at character `place` or after."""
        with _blamed(self.path):
            encoding = self.tokenizer.encode(text)
        ids = encoding.ids
        added = 0 if self.bos is None or ids[:1] == [self.bos] else 1
        first = next((i for i, (begin, end) in enumerate(encoding.offsets)
                      if begin >= place and end > begin), len(ids))
        return [self.bos] * added + ids, added + first

    def encode_plain(self, text: str) -> list[int]:
        """Without BOS: a text that stands where prompt rows do."""
        with _blamed(self.path):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with _blamed(self.path):
            return self.tokenizer.decode(ids)

    def first_line(self, ids: list[int]) -> str:
        """A generated answer: without its line break and what may follow."""
        return self.decode(ids).split("\n")[0].strip()


@contextlib.contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """What the tokenizers library raises, bare Exceptions and panics, which are none, is the
    fault of its file."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise DataError(f"{path}: not a tokenizer ({e}): fetch it again") from None


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """A panic's own lines on stderr go nowhere."""
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no stderr
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Row(NamedTuple):
    """An example as tokens."""

    ids: list[int]  # BOS, context, question, answer, line break
    start: int  # index of the answer's first token in ids
    question: list[int]  # as it is asked, without the answer: ids[:start], unless the seam merges
    context: str  # rows of one context share their beginning
    cut: int  # context tokens that did not fit
    body: int = 0  # index of the question's first token in ids: the context ends there


def question_text(context: str, question: str) -> str:
    """The paper's template; nothing stands before "Question:" when there is no context."""
    return f"{context}\nQuestion: {question}\nAnswer:" if context \
        else f"Question: {question}\nAnswer:"


def encode(example: Example, vocabulary: Vocabulary, max_length: int) -> Row | None:
    """Tokenise the whole text at once (pieces would merge differently at their seams),
    then find the answer.

    A row over max_length loses words at the context's end, never in question or answer; None if
    those alone are too long. An unanswerable question's answer is a space, which no tokenizer
    merges with the colon before it. A text is a row without a question."""
    if example.kind == "text":
        ids = vocabulary.encode(example.context[:SEEN])
        cut = max(len(ids) - max_length, 0)
        ids = ids[:max_length]
        return Row(ids, len(ids), ids, example.context, cut, len(ids))
    answer = f" {example.answers[0] if example.answers else ''}\n"
    context, cut = example.context[:SEEN], 0
    if len(example.question) + len(answer) > SEEN:
        return None
    while True:
        question = question_text(context, example.question)
        ids, body = vocabulary.encode_at(question + answer, len(context))
        excess = len(ids) - max_length
        if excess <= 0:
            asked = vocabulary.encode(question)
            start = len(common_beginning([ids, asked]))
            return Row(ids, start, asked, example.context, cut, body)
        if not context:
            return None
        offsets = vocabulary.tokenizer.encode(context, add_special_tokens=False).offsets
        keep = max(len(offsets) - excess, 0)
        # tokens of one character have one offset: drop it whole
        shorter = context[: offsets[keep][0]].rstrip()
        context, cut = shorter if shorter != context else context[:-1], cut + len(offsets) - keep


def common_beginning(rows: list[list[int]]) -> list[int]:
    """The longest list that all rows start with."""
    low, high = min(rows), max(rows)  # in lexicographic order these two differ first
    n = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return low[:n]


# --------------------------------------------------------------------------------------------------
# batches


class Order:
    """order[step] -> the indices of that step's rows; a pure function of (seed, step), so nothing
    is to be saved.

    contexts holds the context of every row. Every epoch shuffles the contexts, and the questions
    within each, so questions of one context meet in a batch; share=False shuffles single rows. A
    batch may span two epochs, so none is short."""

    def __init__(self, contexts: list[str], size: int, seed: int, share: bool = True):
        self.count, self.size, self.seed = len(contexts), size, seed
        groups: dict = {}
        for i, context in enumerate(contexts):
            groups.setdefault(context if share and context else i, []).append(i)
        self.groups = list(groups.values())
        self._epoch = functools.lru_cache(maxsize=2)(self.epoch)

    def epoch(self, number: int) -> list[int]:
        r = random.Random(f"{self.seed} {number}")
        groups = [r.sample(g, len(g)) for g in r.sample(self.groups, len(self.groups))]
        return [i for g in groups for i in g]

    def __getitem__(self, step: int) -> list[int]:
        places = range(step * self.size, (step + 1) * self.size)
        return [self._epoch(p // self.count)[p % self.count] for p in places]


class Batch(NamedTuple):
    """A trie of depth two: P distinct beginnings, Q tails that go on from them."""

    shared: Tensor  # (P, Tc) int64, PAD on the right; Tc may be 0
    tails: Tensor  # (Q, Tq) int64, PAD on the right: the rest of the question, and the answer
    parent: Tensor  # (Q,) int64: row of `shared` that a tail goes on from
    labels: Tensor  # (Q, Tq) int64: the token that follows if it is the answer's, else NO_LABEL
    asked: list[list[int]]  # Q tails without the answer, to generate from
    head: Tensor | None = None  # (Q, Th) int64: tokens between a beginning and its tail's prompt

    def to(self, device) -> Batch:
        return Batch(*(t.to(device) for t in self[:4]), self.asked,
                     None if self.head is None else self.head.to(device))


def collate(rows: list[Row], share: bool = True, suffix: bool = False) -> Batch:
    """Rows -> a trie, in their order. Causality makes it exact: what a beginning computes does not
    depend on its tail.

    At least the last token before an answer is in its tail: it predicts the answer's first one.
    suffix: that token alone is, so that a prompt can stand in front of it; the rest is in head."""
    import torch

    groups: dict = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.context if share else i, []).append(i)
    shared, head, tails, labels, asked, parent = [], {}, {}, {}, {}, {}
    for members in groups.values():
        # where the answer changes the question's last token, the seam is before that
        seams = {i: min([rows[i].start - 1] + suffix * [len(rows[i].question) - 1, len(
            common_beginning([rows[i].ids, rows[i].question]))]) for i in members}
        # suffix: no head is empty, or of processes that share weights one would run a layer less
        beginning = common_beginning([rows[i].ids[:max(seams[i] - suffix, 0)] for i in members])
        c = len(beginning)
        for i in members:
            row, seam = rows[i], seams[i] if suffix else c
            head[i], tails[i], asked[i] = row.ids[c:seam], row.ids[seam:-1], row.question[seam:]
            parent[i] = len(shared)
            labels[i] = [NO_LABEL] * (row.start - seam - 1) + row.ids[row.start:]
        shared.append(beginning)

    def padded(lists, value):
        T = max(map(len, lists))
        return torch.tensor([x + [value] * (T - len(x)) for x in lists],
                            dtype=torch.int64).view(len(lists), T)

    in_order = lambda found: [found[i] for i in range(len(rows))]
    return Batch(padded(shared, PAD), padded(in_order(tails), PAD), torch.tensor(in_order(parent)),
                 padded(in_order(labels), NO_LABEL), in_order(asked),
                 padded(in_order(head), PAD) if suffix else None)


# --------------------------------------------------------------------------------------------------
# scores


def score(example: Example, prediction: str | None) -> dict[str, float]:
    """Scores of an answer, 0 to 1, the best over those accepted. None, a missing one, counts 0."""
    judge = _score_text if example.kind == "squad" \
        else functools.partial(_score_value, example.question)
    if prediction is None:
        return dict.fromkeys(judge("x", "x"), 0.0)
    return _best([judge(prediction, gold) for gold in _golds(example)])


def mean_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means in percent, as the SQuAD script gives them."""
    return {key: 100 * sum(s[key] for s in scores) / len(scores)
            for key in scores[0]} if scores else {}


def _golds(example: Example) -> list[str]:
    """v2.0's rule: golds that are empty after normalisation are dropped, and if none is left the
    empty answer is it."""
    if example.kind != "squad":
        return list(example.answers)
    return [a for a in example.answers if normalize(a)] or [""]


def _best(scores: list[dict[str, float]]) -> dict[str, float]:
    """Exact match and F1 each over all golds, as the official script; precision and recall are
    of the best F1."""
    top = max(scores, key=lambda s: s.get("f1", 0.0))
    return {key: top[key] if key in ("precision", "recall") else max(s[key] for s in scores)
            for key in top}


def normalize(text: str) -> str:
    """SQuAD's normalisation, in its order: lower case, ASCII punctuation out, articles out,
    spaces squeezed."""
    text = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _score_text(prediction: str, gold: str) -> dict[str, float]:
    p, g = normalize(prediction).split(), normalize(gold).split()
    same = sum((Counter(p) & Counter(g)).values())
    if not p or not g:  # v2.0: an empty answer is right only where an empty one is expected
        same_empty = float(p == g)
        return {"exact_match": same_empty, "precision": same_empty, "recall": same_empty,
                "f1": same_empty}
    precision, recall = same / len(p), same / len(g)
    return {"exact_match": float(p == g), "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if same else 0.0}


def _score_value(question: str, prediction: str, gold: str) -> dict[str, float]:
    """accuracy: the same string, DeepMind's own measure. accuracy_value: the same number."""
    exact = prediction.strip() == gold.strip()
    # 98 in base 14 is not the decimal 98.0
    in_base = re.search(r"\bbase\s+[0-9]+", question, re.IGNORECASE)
    same = exact or (not in_base and None is not value(prediction) == value(gold))
    return {"accuracy": float(exact), "accuracy_value": float(same)}


def value(text: str) -> Fraction | None:
    """An integer, a decimal or a fraction, a/b or \\frac{a}{b}; None for anything else."""
    text = re.sub(r"^([+-]?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text.strip())
    if len(text) > 1000 or not re.fullmatch(
            r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(/[+-]?[0-9]+)?", text):
        return None
    numerator, _, denominator = text.partition("/")
    denominator = Fraction(denominator or 1)
    return Fraction(numerator) / denominator if denominator else None
