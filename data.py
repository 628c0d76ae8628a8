"""Question-answering and text data in their published formats: files -> examples -> token rows ->
batches, and the scores of predictions.

Needs tokenizers, and torch only in `collate`. It reads files and returns values. It never prints or
writes, and knows nothing of models. (The tokenizers library prints a report when it panics.)

    examples = read("squad", "train-v1.1.json")          # [Example(context, question, ...), ...]
    rows = [encode(e, vocabulary, max_length=512) for e in examples]
    batch = collate([rows[i] for i in Order([r.context for r in rows], size=32, seed=0)[step]])
    score(examples[0], "a prediction")                   # {"exact_match": 0.0, "f1": 0.4, ...}
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import gzip
import hashlib
import io
import json
import math
import random
import re
import shlex
import string
import zlib
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, NamedTuple

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from torch import Tensor

PAD = -1  # an empty place in a batch of token ids
NO_LABEL = -100  # a place whose prediction is not scored
LARGEST = 2**31  # bytes; a larger file is not read at once
LONGEST = 2**24  # characters; a longer text is an error
LONGEST_TOKENISED = 2**20  # characters; the tokenizer holds over 100 bytes for each of them
EXPANDED = 100  # the most that a .gz may grow by when unpacked; text grows 3 to 10 times
HAS_NUL = "a NUL, so this is no text, or UTF-16: convert it to UTF-8"


class DataError(ValueError):
    """Data that cannot be used: the file, its fault, and the remedy, in one line."""


class Example(NamedTuple):
    id: str
    kind: str  # decides the scores: F1 of "squad", else exact match; a "text" has no question
    context: str  # "" for arithmetic; the whole text of "text"
    question: str
    answers: tuple[str, ...]  # all that are accepted, the first is trained on; () is unanswerable
    source: str = ""  # the article or the module that it is of, "" if the file names none
    rationale: str = ""  # the worked solution, where the data have one
    choices: tuple[str, ...] = ()  # of "choice": all answers that may be given, each of them once


# --------------------------------------------------------------------------------------------------
# files


def read(kind: str, path: str, limit: int | None = None) -> list[Example]:
    """All examples of a file, a folder or a glob; of "text", which may be long, `limit` at most."""
    return list(islice(stream(kind, path), limit if kind == "text" else None))


def stream(kind: str, path: str) -> Iterator[Example]:
    """The examples of `read`, one at a time. Raises DataError if there are none."""
    count = 0
    for file in files_of(kind, path):
        for example in READERS[kind].read_file(file):
            count += 1
            yield example
    if count == 0:
        raise DataError(f"{path}: no examples in it, expected at least one {kind} example: "
                        "choose another file")


def files_of(kind: str, path: str) -> list[Path]:
    """The files of `matching_files` that are data: of DeepMind's the modules, if there are any, and
    no readmes and licences that would be read as sums."""
    files, names = matching_files(kind, path), READERS[kind].names
    return files if not names else [p for p in files if p.match(names)] or [
        p for p in files if not re.search("readme|licen[cs]e", p.name, re.I)] or files


def matching_files(kind: str, path: str) -> list[Path]:
    """The files that a path stands for, sorted: the file itself, those that a glob matches, or
    those in a folder that end as the kind's do. Raises DataError if there are none."""
    root = Path(path)
    expected = "a file, a folder, or a pattern that matches files"
    try:
        if root.is_dir():
            suffixes = READERS[kind].suffixes
            expected = f"a file ending in {' or '.join(suffixes)} below it"
            candidates = [p for p in files_below(root) if p.name.lower().endswith(suffixes)]
        elif root.exists():
            candidates = [root]
        else:
            # glob.glob follows links to folders, also in circles. Path.glob does not, but its **
            # matches folders alone, where a user means the files in them.
            pattern = str(root.relative_to(root.anchor)) + ("/*" if path.endswith("**") else "")
            matches = Path(root.anchor or ".").glob(pattern)
            candidates = [p for p in matches if not p.name.startswith(".")]
        files = sorted(p for p in candidates if p.is_file())  # reading a pipe could wait for ever
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read ({e}): check the path") from None
    if not files:
        raise DataError(f"{path}: nothing found, expected {expected}: check the path")
    return files


def files_below(folder: Path) -> list[Path]:
    """The files in a folder at any depth, sorted, without what is the system's or an editor's, as a
    glob does not find it either."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not any(
        part.startswith((".", "__MACOSX")) for part in p.relative_to(folder).parts))


# --------------------------------------------------------------------------------------------------
# texts and records


def read_text(path: str | Path, most: int = LARGEST, whole_lines: bool = False) -> str:
    """The text of a UTF-8 file of at most `most` bytes, without its byte order mark, with \\n as
    line end. whole_lines: without what follows the last line end, of a file that grows by lines; a
    writer that was killed leaves the beginning of one there, a power cut zeros. Raises DataError if
    it cannot be read or is not text."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise DataError(f"{path}: a folder, a pipe or a device, expected a file: check the "
                            "path")
        size = path.stat().st_size
        if size > most:
            raise DataError(f"{path}: {size} bytes, and no more than {most} are read at once: "
                            "check the file, or divide it")
        content = path.read_bytes()
        if whole_lines:
            content = content[:content.rfind(b"\n") + 1]
        text = content.decode("utf-8-sig")
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}): check the path") from None
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8 text ({e.reason}, byte "
                        f"0x{e.object[e.start]:02x}): convert it, or check its kind") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path} line {line}: {HAS_NUL}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


class Number(str):
    """A number of a data file as it is written there: as an answer, 1.50 is not 1.5."""


_as_written = functools.partial(json.loads, parse_int=Number, parse_float=Number)


def parse_json(text: str, where: str, loads: Callable = json.loads):
    """The value of a JSON text. Raises DataError that begins with `where` if it is not JSON, or
    holds half a surrogate pair, which is no character and cannot be written to any file."""
    try:
        value = loads(text)
        if "\\u" in text:  # half a pair can come from an escape alone
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as e:
        cause = f"half a surrogate pair, \\u{ord(e.object[e.start]):04x}"
    except RecursionError:
        cause = "nested too deep"
    except ValueError as e:
        cause = str(e)
    raise DataError(f"{where}: not JSON ({cause}): repair it there, or fetch the file again")


def read_json(path: str | Path, type_: type = object, most: int = LARGEST):
    """The value of a JSON file. Raises DataError if it is not of this type."""
    value = parse_json(read_text(path, most), str(path))
    if not isinstance(value, type_):
        raise DataError(f"{path}: holds {type(value).__name__}, expected {type_.__name__}: fetch "
                        "it again")
    return value


def json_lines(text: str, path: str | Path, loads: Callable = json.loads
               ) -> Iterator[tuple[str, dict]]:
    """(where, object) of every line that is not empty; where is "PATH line 3"."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _object(parse_json(line, where, loads), where)


def _object(value, where: str) -> dict:
    """value, a JSON object. Raises DataError that begins with `where` for any other value."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds {type(value).__name__}, expected an object with named "
                        "fields: check the file's kind")
    return value


TABLES = (".csv", ".tsv")
RECORDS = (".json", ".jsonl", *TABLES)  # endings of what _records reads
# What the fields of multiple-choice data are called; of those that a record has the first counts.
CONTEXTS = ("passage", "context", "article", "paragraph", "premise", "sentence1", "question1",
            "sentence", "text")
QUESTIONS = ("question", "question_stem", "hypothesis", "sentence2", "question2", "sentence",
             "text", "ctx")
CHOICES = ("choices", "options", "endings")
OWN_CHOICE = re.compile(r"(choice|option|answer|ending|sol|op)_?([0-9]|[a-e])", re.I)
LABELS = ("label_text", "answerKey", "answer", "label")
# An object with one of these names is a record, or has the columns of records.
FIELDS = {*CONTEXTS, *QUESTIONS, *CHOICES, *LABELS, "paragraphs", "qas", "answers", "problem",
          "solution"}


def _records(text: str, path: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) of a table (.csv, .tsv), of JSON lines, or of a JSON value, whose numbers are
    a Number. A record may be wrapped as {"row": record}, as the hub's API wraps it."""
    first_line, line_end, _ = text.strip().partition("\n")
    if path.suffix.lower() in TABLES:
        found = _table(text, path)
    elif line_end and first_line.rstrip().endswith("}") and not first_line.startswith("["):
        found = json_lines(text, path, _as_written)
    else:
        if first_line[:1].isalpha() and path.suffix.lower() != ".json":
            raise DataError(f"{path}: not JSON, and a table's name ends in {' or '.join(TABLES)}: "
                            "name a table so, or check the file's kind")
        value = parse_json(text, str(path), _as_written) if first_line else []
        found = ((f"{path} record {number}", record)
                 for number, record in enumerate(_record_list(value, path), 1))
    for where, record in found:
        yield where, _object(_unwrapped(record), where)


def _unwrapped(record):
    is_wrapped = isinstance(record, dict) and isinstance(record.get("row"), dict)
    return record["row"] if is_wrapped else record


def _record_list(value, path: Path) -> list:
    """The records of a JSON array; of the list of records in an object, under any name; of an
    object of records, or of columns, which are lists, or objects of rows as pandas writes them; or
    the one record that an object is."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    columns = list(value.values())
    if FIELDS.isdisjoint(value):
        if all(isinstance(row, dict) and not FIELDS.isdisjoint(row) for row in columns):
            return columns
        lists = {key: items for key, items in value.items() if isinstance(items, list)
                 and all(isinstance(item, dict) for item in items)}
        # The hub's API lists the features beside the rows. They have none of the names.
        lists = {key: items for key, items in lists.items()
                 if items and not FIELDS.isdisjoint(_unwrapped(items[0]))} or lists
        if len(lists) > 1:
            raise DataError(f"{path}: {_choose_list(lists, path)}")
        if lists:
            return next(iter(lists.values()))
    elif all(isinstance(column, dict) and column.keys() == columns[0].keys()
             for column in columns):
        columns = [list(column.values()) for column in columns]
    if "paragraphs" in value or not all(isinstance(column, list) for column in columns):
        return [value]
    if len(set(map(len, columns))) > 1:
        raise DataError(f"{path}: its columns differ in length: write it as a list of records, "
                        "each with its fields' names")
    return [dict(zip(value, values)) for values in zip(*columns)]


def _choose_list(lists: dict[str, list], path: Path) -> str:
    """The refusal of an object with several lists of records, and the command that writes one."""
    key = min(lists, key=len)[:80]
    target = f"{path}.{re.sub(r'[^0-9A-Za-z]', '_', key)}.jsonl"
    return (f"has several lists of records, {', '.join(map(repr, lists)):.200}, such as splits: "
            "write one as JSON lines by `python -c \"import json, sys; [print(json.dumps(r)) for r "
            "in json.load(open(sys.argv[1], 'rb'))[sys.argv[2]]]\" "
            f"{shlex.quote(str(path))} {shlex.quote(key)} > {shlex.quote(target)}` and give "
            f"{target}")


def _lacks(record: dict, *keys: str) -> str:
    """The refusal of a record without these names, which may have what they stand for under
    another."""
    return (f"no {' and no '.join(map(repr, keys))}, only {', '.join(map(repr, record)):.300}: "
            "rename the one that is meant, or check that the file is of this kind")


def _field(record: dict, key: str, type_: type, where: str):
    """record[key]. Raises DataError that begins with `where` if it is absent or of another type; a
    number is no text."""
    value = record.get(key)
    if not isinstance(value, type_) or isinstance(value, Number):
        if key not in record:
            raise DataError(f"{where}: {_lacks(record, key)}")
        expected = {str: "a text", list: "a list", dict: "an object"}[type_]
        raise DataError(f"{where}: {key!r} is {type(value).__name__}, expected {expected} of that "
                        "name: check that the file is of this kind")
    if type_ is str and len(value) > LONGEST:
        raise DataError(f"{where}: {key!r} has {len(value)} characters, and no more than "
                        f"{LONGEST} make sense: check the file")
    return value


def _read_squad(path: Path) -> Iterator[Example]:
    """SQuAD v1.1 and v2.0, and the shapes in which people have their questions: articles or
    paragraphs alone, one record a question, with answers of any form that `_answers` knows; as
    JSON, JSON lines or columns, or as a table (.csv, .tsv)."""
    for where, record in _records(read_text(path), path):
        if path.suffix.lower() in TABLES:
            for key in ("answers", "answer"):
                if key in record:
                    record[key] = _literal(record[key], where)
        yield from _questions(record, where)


def _questions(item: dict, where: str, context: str | None = None, title: str = ""
               ) -> Iterator[Example]:
    """The questions of an article, a paragraph, or a record of one question."""
    title = str(_object(item, where).get("title") or title)
    if "paragraphs" in item:
        for number, paragraph in enumerate(_field(item, "paragraphs", list, where)):
            yield from _questions(paragraph, f"{where} paragraph {number}", title=title)
        return
    if "qas" in item:
        context = _field(item, "context", str, where)
        for question in _field(item, "qas", list, where):
            yield from _questions(question, where, context, title)
        return
    answers = _answers(item, where)
    if context is None:
        context = _field(item, "context", str, where)
    question = _field(item, "question", str, where)
    yield Example(str(item.get("id", where)), "squad", context, question, answers, title)


def _answers(record: dict, where: str) -> tuple[str, ...]:
    """All accepted answers: {"text": [...]}, [{"text": ...}, ...], [...], or a single text; under
    "answers", or "answer" where a record has no "answers". A number is read as it is written."""
    if not {"answers", "answer"} & record.keys():
        raise DataError(f"{where}: {_lacks(record, 'answers', 'answer')}")
    answers = record.get("answers")
    if answers is None:
        answers = record.get("answer")
    if isinstance(answers, dict):
        answers = answers.get("text")
    if not isinstance(answers, list):
        answers = [answers]
    texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
    for text in texts:
        if isinstance(text, bool):
            raise DataError(f"{where}: the answer is {str(text).lower()}, which is no text: write "
                            "the word that is meant in quotes, such as \"yes\" or \"True\"; or "
                            "read the file as choice:PATH")
        if not isinstance(text, (str, int)):
            raise DataError(f"{where}: 'answers' are {answers!r:.80}, expected texts or numbers, "
                            "as a list, as {'text': [...]} or as [{'text': ...}]: check that the "
                            "file is of this kind")
    if str(record.get("is_impossible")).lower() in ("true", "1"):
        return ()
    return tuple(str(text) for text in texts if text != "")


def _table(text: str, path: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) of a table whose first line names its columns."""
    csv.field_size_limit(LONGEST)
    # A quote that is not closed would swallow the rest if the reader were not strict.
    reader = csv.DictReader(io.StringIO(text), delimiter=_delimiter(text, path), strict=True)
    try:
        for record in reader:
            where = f"{path} line {reader.line_num}"
            if None in record or None in record.values():
                raise DataError(f"{where}: not as many fields as the first line names: repair it")
            yield where, record
    except csv.Error as e:
        raise DataError(f"{path} line {reader.line_num}: not a table ({e}): repair it") from None


def _delimiter(text: str, path: Path) -> str:
    """What divides the columns: the one mark that stands between the names in the first line, as
    Excel writes ; in many countries. If none or several do, the mark of the file's ending."""
    names = re.sub(r'"[^"]*"', "", text.partition("\n")[0])
    marks = [mark for mark in ",;|\t" if mark in names]
    return marks[0] if len(marks) == 1 else "\t" if path.suffix.lower() == ".tsv" else ","


def _literal(text: str, where: str):
    """A text of a table, or the list or dict that it is the Python or JSON spelling of. Raises
    DataError for what begins as a list or a dict of texts and cannot be read as one."""
    if not text.startswith(("[", "{")):
        return text
    with contextlib.suppress(ValueError, RecursionError):
        return _as_written(text)
    if len(text) <= 2**16:  # Python's parser is not made for hostile texts
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(text)
            # Of numpy's ['a' 'b'] Python makes one text.
            if isinstance(value, (list, dict)) and not re.search(r"""['"]\s+['"]""", text):
                return value
    if not re.match(r"""[\[{]\s*([\[{"']|array\()""", text):  # such as [Applause] and [0, 1)
        return text
    raise DataError(f"{where}: the answers {text!r:.80} are no Python or JSON value: export the "
                    "table as JSON lines")


def _read_math(path: Path) -> Iterator[Example]:
    """DeepMind mathematics: question and answer on alternating lines, or an export of them as
    JSON or a table."""
    text = read_text(path)
    name = f"{path.parent.name}/{path.stem}"
    if path.suffix.lower() in RECORDS:
        for i, (where, record) in enumerate(_records(text, path)):
            question = _unbyte(_field(record, "question", str, where))
            answers = tuple(map(_unbyte, _answers(record, where)))
            yield Example(f"{name}-{i}", "math", "", question, answers, name)
        return
    lines = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    if "" in lines:
        raise DataError(f"{path} line {lines.index('') + 1}: empty, expected a question and an "
                        "answer in turn: delete it, or write what is missing")
    if len(lines) % 2:
        raise DataError(f"{path}: {len(lines)} lines, expected a question and an answer in turn, "
                        f"so an even number; line {len(lines)} has no answer: repair the file")
    for i, (question, answer) in enumerate(zip(lines[::2], lines[1::2])):
        yield Example(f"{name}-{i}", "math", "", question, (answer,), name)


def _unbyte(text: str) -> str:
    """The export writes the repr of bytes: b'What is 1 + 1?\\n' -> What is 1 + 1?"""
    # Python's parser runs on the text, so it has to be one literal and nothing else.
    if re.fullmatch(r"b'(?:[^'\\\n]|\\.)*+'|b\"(?:[^\"\\\n]|\\.)*+\"", text):
        with contextlib.suppress(ValueError, SyntaxError):  # a text may only look like a literal
            text = ast.literal_eval(text).decode()
    return text.strip()


def _read_hendrycks(path: Path) -> Iterator[Example]:
    """Hendrycks MATH: one problem a file, or records; the solution's last \\boxed is the answer."""
    for i, (where, record) in enumerate(_records(read_text(path), path)):
        solution = _field(record, "solution", str, where)
        answer = last_boxed(solution)
        if answer is None:
            raise DataError(f"{where}: no \\boxed answer in the solution: "
                            "check that the file is Hendrycks MATH")
        name = f"{path.parent.name}/{path.stem}" + (f"-{i}" if i else "")
        problem = _field(record, "problem", str, where)
        yield Example(name, "hendrycks", "", problem, (answer,), rationale=solution)


def _read_gsm8k(path: Path) -> Iterator[Example]:
    """GSM8K: the number after #### is the answer, what stands before it the rationale."""
    for i, (where, record) in enumerate(_records(read_text(path), path)):
        solution = "".join(_answers(record, where)[:1])
        rationale, mark, answer = solution.rpartition("####")
        number = answer.strip().replace(",", "").removeprefix("$").rstrip("%.")
        if not mark or not re.fullmatch(r"[+-]?([0-9]+(\.[0-9]+)?|\.[0-9]+)", number):
            raise DataError(f"{where}: no #### with a number behind it at the answer's end: read "
                            "answers without a solution as math:PATH; else check that the file is "
                            "GSM8K")
        question = _field(record, "question", str, where)
        yield Example(f"{path.stem}-{i}", "gsm8k", "", question, (number,),
                      rationale=rationale.strip())


MOST_LABELS = 200


def _read_choice(path: Path) -> Iterator[Example]:
    """Multiple choice. Records with choices of their own (ARC, MMLU, HellaSwag) are asked with
    these in a list, and answered by a letter. Of records without (BoolQ, SST-2, intents) the
    choices are all labels of the file; true and false are asked for as yes and no."""
    records = [(where, record, _listed(record, where))
               for where, record in _records(read_text(path), path)]
    labels = tuple(sorted({_label(record, where) for where, record, listed in records
                           if not listed}))
    if labels and not 2 <= len(labels) <= MOST_LABELS:
        raise DataError(f"{path}: no lists of choices, and {len(labels)} different labels, "
                        f"expected 2 to {MOST_LABELS}: check that the file is multiple choice")
    for i, (where, record, listed) in enumerate(records):
        context, question = _asked(record, where)
        choices, answer = labels, _label(record, where)
        if listed:
            choices = tuple(string.ascii_uppercase[:len(listed)])
            answer = choices[_right_choice(record, listed, where)]
            lines = [f"\n{letter}. {text}" for letter, text in zip(choices, listed.values())]
            question += "".join(lines)
        name = str(record.get("id", f"{path.stem}-{i}"))
        yield Example(name, "choice", context, question, (answer,), choices=choices)


def _first_of(record: dict, names: tuple[str, ...]) -> str:
    """The first name that the record has; if it has none, the first at all."""
    return next((name for name in names if record.get(name) is not None), names[0])


def _asked(record: dict, where: str) -> tuple[str, str]:
    """(context, question) of a record of multiple choice."""
    name = _first_of(record, QUESTIONS)
    if isinstance(record.get(name), dict):  # of ARC's own files
        record = {**record, name: record[name].get("stem")}
    question = _field(record, name, str, where)
    others = {key: value for key, value in record.items() if key != name}
    name = _first_of(others, CONTEXTS)
    return (_field(others, name, str, where) if name in others else ""), question


def _listed(record: dict, where: str) -> dict[str, str]:
    """A record's own choices, {label: text}, {} if it has none: the same, a list of texts or of
    {"label", "text"}, or {"label": [...], "text": [...]}."""
    inner = record.get("question")
    holder = inner if isinstance(inner, dict) and "choices" in inner else record
    choices = holder.get(_first_of(holder, CHOICES))
    if isinstance(choices, str):  # in a table
        choices = _literal(choices, where)
    if choices is None:
        named = [key for key in record if OWN_CHOICE.fullmatch(key)]
        if len(named) > 1:
            raise DataError(f"{where}: its choices have a field each, {', '.join(named):.200}: "
                            "write them as one list, \"choices\", in this order, and as the answer "
                            "the text of the right one, or its number from 0 on")
        return {}
    if isinstance(choices, dict) and all(isinstance(v, list) for v in choices.values()):
        choices = [dict(zip(choices, values)) for values in zip(*choices.values())]
    elif isinstance(choices, dict):
        choices = [{"label": label, "text": text} for label, text in choices.items()]
    if isinstance(choices, list):
        choices = [c if isinstance(c, dict) else {"label": str(i), "text": c}
                   for i, c in enumerate(choices)]
        texts = {str(c.get("label", i)): c.get("text") for i, c in enumerate(choices)}
        is_text = all(isinstance(text, str) for text in texts.values())
        if is_text and 2 <= len(choices) == len(texts) <= 26:
            return {label: one_line(text) for label, text in texts.items()}
    raise DataError(f"{where}: its choices are {choices!r:.80}, expected 2 to 26 texts, as a list "
                    "or with labels of their own: check that the file is multiple choice")


def _right_choice(record: dict, listed: dict[str, str], where: str) -> int:
    """The index of the right choice, which is named by its label, its text, its letter, or its
    number from 0 on."""
    answer, value = _label(record, where), record[_first_of(record, LABELS)]
    labels, texts = list(listed), list(listed.values())
    spellings = {answer, str(value)}  # of true, which is asked for as yes, both
    matches = {labels.index(answer)} if answer in labels else set()
    is_number = isinstance(value, Number)
    if is_number and not any(map(str.isdecimal, labels)):  # choices with letters
        matches = {i for i in range(len(texts)) if str(i) == answer}
    # A number that is written as a text may be a choice's text as well.
    if not is_number and (not matches or labels[0] == "0"):
        matches |= {i for i, text in enumerate(texts) if text in spellings}
        matches |= {i for i in range(len(texts)) if string.ascii_uppercase[i] == answer}
    if len(matches) != 1:
        raise DataError(f"{where}: the answer {answer!r:.80} names {len(matches)} of its "
                        f"{len(texts)} choices: give the label or the text of one, or its number "
                        "from 0 on")
    return matches.pop()


def _label(record: dict, where: str) -> str:
    """What names the right answer, as text."""
    if record.keys().isdisjoint(LABELS):
        raise DataError(f"{where}: {_lacks(record, *LABELS)}")
    value = record.get(_first_of(record, LABELS))
    if isinstance(value, bool) or str(value).lower() in ("true", "false"):
        value = "yes" if str(value).lower() == "true" else "no"
    if isinstance(value, Number):  # pandas writes counts as 1.0
        value = value.removesuffix(".0")
    text = one_line(value).strip() if isinstance(value, str) else ""
    if not text or text == "-1":
        raise DataError(f"{where}: {value!r:.80} is no right answer; expected one as "
                        f"{', '.join(LABELS[:-1])} or {LABELS[-1]}: give data with labels")
    return text


def last_boxed(solution: str) -> str | None:
    """The argument of the last \\boxed{..}, \\fbox{..} or \\boxed x, by matching braces."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*", solution))
    if not boxes:
        return None
    argument = solution[boxes[-1].end():]
    if not argument.startswith("{"):
        return re.split(r"[\s$]", argument, maxsplit=1)[0] or None
    depth = 0
    for i, c in enumerate(argument):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return argument[1:i]
    return None


def _read_texts(path: Path) -> Iterator[Example]:
    """C4 JSON lines (.json, .jsonl, also .gz), or plain text with empty lines between its
    paragraphs. The file is read line by line, as it may be larger than memory; a .json that is one
    array is not."""
    first_line = next((line for _, line in _lines(path) if line.strip()), "")
    if path.suffix.lower() == ".json" and first_line.lstrip().startswith("["):
        for number, (where, record) in enumerate(_records(read_text(path), path), 1):
            yield Example(f"{path.stem}-{number}", "text", _field(record, "text", str, where), "",
                          ())
    elif path.name.lower().removesuffix(".gz").endswith((".json", ".jsonl")):
        for number, line in _lines(path):
            if line.strip():
                where = f"{path} line {number}"
                text = _field(_object(parse_json(line, where), where), "text", str, where)
                yield Example(f"{path.stem}-{number}", "text", text, "", ())
    else:
        for number, text in enumerate(_paragraphs(path), 1):
            yield Example(f"{path.stem}-{number}", "text", text, "", ())


def _paragraphs(path: Path) -> Iterator[str]:
    paragraph = ""
    for number, line in _lines(path):
        if line.strip():
            paragraph += line
            if len(paragraph) > LONGEST:
                raise DataError(f"{path} line {number}: a paragraph of more than {LONGEST} "
                                "characters: part it by empty lines")
        elif paragraph:
            yield paragraph.strip()
            paragraph = ""
    if paragraph:
        yield paragraph.strip()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file or a .gz of one, with one line in memory at a time. Raises
    DataError if a line or an unpacked .gz is too long, as a small .gz may unpack to terabytes."""
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    number, size = 0, 0
    try:
        packed_size = path.stat().st_size
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            while line := file.readline(LONGEST + 1):
                number += 1
                size += len(line)
                where = f"{path} line {number}"
                if len(line) > LONGEST:
                    raise DataError(f"{where}: longer than {LONGEST} characters: divide it")
                if size > max(EXPANDED * packed_size, LONGEST):
                    raise DataError(f"{where}: {packed_size} bytes have become {size}, which no "
                                    "text does: do not use this file unless you trust its maker")
                if "\0" in line:
                    raise DataError(f"{where}: {HAS_NUL}")
                yield number, line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read after line {number} ({e}): fetch it "
                        "again") from None


class Reader(NamedTuple):
    read_file: Callable[[Path], Iterator[Example]]  # raises DataError for a file of another format
    suffixes: tuple[str, ...]  # of the files that are looked for in a folder, in lower case
    names: str | None = None  # pattern; if files there have such names, only these are read


# To add a format, write its read_file above and give it a line. The kind of its examples decides
# how answers are scored: see Example.
READERS = {
    "squad": Reader(_read_squad, RECORDS),
    "math": Reader(_read_math, (".txt", *RECORDS), "*__*"),
    "hendrycks": Reader(_read_hendrycks, RECORDS),
    "gsm8k": Reader(_read_gsm8k, RECORDS),
    "choice": Reader(_read_choice, RECORDS),
    "text": Reader(_read_texts, (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".txt", ".txt.gz")),
}


# --------------------------------------------------------------------------------------------------
# tokens


class Vocabulary:
    """A model folder's tokenizer.json, with what the files beside it change. The ids of a text are
    those of transformers' AutoTokenizer (5.23), except that an EOS at the end is dropped, and that
    a text which begins with BOS gets no second one.

    self.bos is the id in front of every text, or None. adds_bos, adds_eos: whether the
    tokenizer puts one in front of a text, or behind it; behind: what it puts there, ids.
    unembedded: its tokens that the model does not embed, {id: token}; a text with one is refused.
    remarks: lines about what is unusual."""

    def __init__(self, folder: str | Path, eos: tuple[int, ...] = (), bos: int | None = None,
                 embedded: int | None = None, config_bos: int | None = None):
        """eos, config_bos: the ids in config.json. bos: what to put in front where the tokenizer
        has none. embedded: how many ids the model embeds."""
        from tokenizers import Tokenizer

        self.path = Path(folder) / "tokenizer.json"
        self.eos, self.config_bos = eos, config_bos
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file: a model folder needs its tokenizer.json: "
                            "fetch it")
        text = read_text(self.path)
        with _tokenizer_errors(self.path):
            self.tokenizer = Tokenizer.from_str(text)
            if getattr(self.tokenizer.model, "dropout", None):
                self.tokenizer.model.dropout = None  # it would draw other tokens each time
            self.remarks = _apply_settings(self.tokenizer, self.path.parent, '"ByteLevel"' in text)
            self.tokenizer.no_truncation()  # a file may ask for either; both falsify texts
            self.tokenizer.no_padding()
            encoding = self.tokenizer.encode(string.printable + "\u00fc\u732b\0")
            # Some broken files load without error and fail when they are used.
            self.tokenizer.decode(encoding.ids)
        # What the tokenizer adds: _front tokens before every text, and `behind` after it.
        is_text = [not added for added in encoding.special_tokens_mask]
        self._front, last = 0, len(is_text)
        if True in is_text:
            self._front, last = is_text.index(True), last - is_text[::-1].index(True)
        self.behind = encoding.ids[last:]
        if self._front > 1:
            raise DataError(f"{self.path}: puts tokens {encoding.ids[:self._front]} in front of a "
                            "text, expected BOS alone: take the others out of its "
                            "post_processor")
        self.adds_bos, self.adds_eos = self._front > 0, bool(self.behind)
        self.bos = encoding.ids[0] if self.adds_bos else bos

        tokens = self.tokenizer.get_vocab(with_added_tokens=True)
        self.ids = sorted(tokens.values())
        limit = self.ids[-1] + 1 if embedded is None else embedded
        self.unembedded = {i: token for token, i in tokens.items() if i >= limit}
        self._check_embedded(limit)

    def _check_embedded(self, limit: int) -> None:
        """Raise DataError if ids from limit on are needed: for every text, or for ordinary ones."""
        added = self.tokenizer.get_added_tokens_decoder()
        if any(i not in added for i in self.unembedded):
            raise DataError(f"{self.path}: has {len(self.ids)} tokens, ids up to {self.ids[-1]}, "
                            f"and the model embeds {limit}: the two are not of one model; fetch "
                            "both again")
        if self.adds_bos and self.bos >= limit:
            raise DataError(f"{self.path}: its post_processor puts token {self.bos} in front of "
                            f"every text, and the model embeds {limit}: write the id there that "
                            "added_tokens gives to the same token, or fetch the tokenizer.json of "
                            "this model")

    @functools.cached_property
    def size(self) -> int:
        return self.ids[-1] + 1

    @functools.cached_property
    def special(self) -> set[int]:
        """Ids that no text contains: BOS, whether the tokenizer's or config.json's, EOS, reserved
        places."""
        reserved = {i for i in self.ids if RESERVED.fullmatch(self.tokenizer.id_to_token(i))}
        added = self.tokenizer.get_added_tokens_decoder().items()
        ends = {self.bos, self.config_bos, *self.eos} - {None}
        return reserved | ends | {i for i, token in added if token.special}

    @functools.cached_property
    def sha256(self) -> str:
        """A checksum of the tokens, and of how they divide a text with every added one in it. Files
        beside tokenizer.json that change neither leave it as it is."""
        added = self.tokenizer.get_added_tokens_decoder()
        text = SPECIMEN + " x".join(token.content for token in added.values())
        tokens = sorted(self.tokenizer.get_vocab(with_added_tokens=True).items())
        with _tokenizer_errors(self.path):
            ids = self.tokenizer.encode(text).ids
        return hashlib.sha256(json.dumps([tokens, ids]).encode()).hexdigest()

    @functools.cached_property
    def bos_ids(self) -> set[int]:
        """Ids that are BOS wherever they stand: the one in front of every text, and config.json's
        where the tokenizer calls it special, as a file's default may be any token."""
        added = self.tokenizer.get_added_tokens_decoder().get(self.config_bos)
        return {self.bos, self.config_bos if added and added.special else None} - {None}

    @functools.cached_property
    def ordinary(self) -> list[int]:
        """The ids of all tokens that are embedded and not special. Ids that no token has, such as
        those that fill a matrix up to a multiple of 64, are none of them."""
        found = sorted(set(self.ids) - self.special - self.unembedded.keys())
        if not found:
            raise DataError(f"{self.path}: has no tokens but special ones: fetch the "
                            "tokenizer.json of this model")
        return found

    @functools.cached_property
    def stop(self) -> set[int]:
        """Ids that end an answer: EOS, and every token with a line break, which byte-level
        tokenizers write as Ċ and sentencepiece's as <0x0A>."""
        likely = [i for i in self.ids if re.search("Ċ|\n|<0x0A>", self.tokenizer.id_to_token(i))]
        # a sentencepiece vocabulary may have the letter Ċ, which is no line break there
        return {*self.eos, *(i for i in likely if "\n" in self.tokenizer.decode(
            [i], skip_special_tokens=False))}

    def encode(self, text: str) -> list[int]:
        with _tokenizer_errors(self.path):
            ids = self.tokenizer.encode(text).ids
        return self._with_bos(ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode of every text, on all cores."""
        with _tokenizer_errors(self.path):
            encodings = self.tokenizer.encode_batch(texts)
        return [self._with_bos(encoding.ids) for encoding in encodings]

    def encode_at(self, text: str, place: int) -> tuple[list[int], int]:
        """encode, and the index of the first token that begins at character `place` or after."""
        with _tokenizer_errors(self.path):
            encoding = self.tokenizer.encode(text)
        ids = self._with_bos(encoding.ids)
        last = len(encoding.ids) - len(self.behind)
        # a token that the tokenizer adds has no characters, so it begins where it ends
        first = next((i for i, (begin, end) in enumerate(encoding.offsets)
                      if begin >= place and end > begin), last)
        return ids, first + len(ids) - last

    def _with_bos(self, ids: list[int]) -> list[int]:
        """ids: what the tokenizer makes of a text."""
        ids = ids[self._front:len(ids) - len(self.behind)]
        if self.unembedded:
            self._refuse_unembedded(ids)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def _refuse_unembedded(self, ids: list[int]) -> None:
        for i in ids:
            if i in self.unembedded:
                raise DataError(f"{self.path}: a text has the token {self.unembedded[i]!r}, number "
                                f"{i}, which the model does not embed: take it out of the text")

    def encode_plain(self, text: str) -> list[int]:
        """Without BOS, as for a text that stands where prompt rows do."""
        with _tokenizer_errors(self.path):
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        self._refuse_unembedded(ids)
        return ids

    def decode(self, ids: list[int]) -> str:
        with _tokenizer_errors(self.path):
            return self.tokenizer.decode(ids)

    def token_text(self, i: int) -> str:
        """A token as it stands in a text, with the space before it. Bytes that are no character are
        written as <0xE2>."""
        piece = self.tokenizer.id_to_token(i)
        if piece is None:
            return f"<{i}>"
        is_sentencepiece = "\u2581" in piece  # its mark of a space
        text = piece.replace("\u2581", " ") if is_sentencepiece else self.decode([i])
        if "\ufffd" in text and all(letter in BYTES for letter in piece):
            text = "".join(f"<0x{BYTES[letter]:02X}>" for letter in piece)
        return text or piece

    def first_line(self, ids: list[int]) -> str:
        """The text of a generated answer up to its line break."""
        return self.decode(ids).split("\n")[0].strip()


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    letters |= {chr(256 + i): byte for i, byte in enumerate(rest)}
    return letters


BYTES = _byte_letters()

# A place in the vocabulary that is kept for later use, though the file does not call it special.
RESERVED = re.compile(r"[<\[]\|?((reserved|unused|dummy|placeholder|pad|extra_id)[\w ]*"
                      r"|(special|control|blank)_?[0-9]+)\|?[>\]]", re.I)

# What tokenizer_config.json calls tokens, in the order in which transformers adds them.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of a token
# Values of tokenizer_class for which transformers takes tokenizer.json as it stands; of a T5 it
# builds the same again.
PLAIN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend", "BloomTokenizer",
                 "T5Tokenizer")
# A text that pre-tokenizers divide in different ways.
SPECIMEN = "In 1856, Ada's  12345 x-rays\n\n40 Öl\nQuestion: \"it's 3.50\"?\nAnswer: Dr. X\n"


def _apply_settings(tokenizer: Tokenizer, folder: Path, byte_level: bool) -> list[str]:
    """Make of a tokenizer.json what transformers' AutoTokenizer makes of it with the files beside
    it, which name tokens and a class -> remarks. byte_level: tokenizer.json says ByteLevel."""
    path = folder / "tokenizer_config.json"
    c = _json_or_nothing(path)
    declared = c.get("tokenizer_class") or _json_or_nothing(
        folder / "config.json").get("tokenizer_class") or "TokenizersBackend"
    name = str(declared).removesuffix("Fast")
    is_plain = name in PLAIN_CLASSES or name == "LlamaTokenizer" and byte_level
    is_anew = not is_plain and name in BUILT_ANEW and type(tokenizer.model).__name__ == "BPE"
    faults = []
    if not is_plain and not is_anew:
        faults.append("may make other tokens of some texts than tokenizer.json, which is used as "
                      "it stands")
    with _tokenizer_errors(f"{path}, or the files of tokens beside it"):
        own = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
        if is_anew:
            # tokenizer.json's own normalizer and pre-tokenizer are what the model was trained with,
            # so it is said if the class changes ordinary texts.
            before = tokenizer.encode(SPECIMEN, add_special_tokens=False).ids
            c = BUILT_ANEW[name](tokenizer, c) | c
            if tokenizer.encode(SPECIMEN, add_special_tokens=False).ids != before:
                faults.append("makes other tokens of some texts than tokenizer.json alone, and is "
                              "used")
        tokens = _added_tokens(tokenizer, folder, c, set() if is_anew else own)
        unknown = sorted(own - {t.content for t in tokens}) if is_anew else []
        if unknown:
            faults.append(f"knows {len(unknown)} tokens of tokenizer.json only if they stand there "
                          f"too, such as {unknown[0]!r:.80}, which are used")
        tokenizer.add_tokens(tokens)
        tokenizer.encode_special_tokens = bool(c.get("split_special_tokens"))
    remarks = [f"{path}: transformers' {declared!s:.80} {fault}: write \"tokenizer_class\": "
               "\"PreTrainedTokenizerFast\" there, and all read tokenizer.json as it stands"
               for fault in faults]
    other = _versioned_file(folder, c)
    if other:
        remarks.append(f"{path}: names {other} among fast_tokenizer_files, which transformers "
                       "reads in place of tokenizer.json: if it is meant, copy it to "
                       "tokenizer.json; else delete that entry")
    return remarks


def _versioned_file(folder: Path, c: dict) -> str | None:
    """The file of another content that transformers 5 takes in place of tokenizer.json, by the
    version in its name."""
    files = c.get("fast_tokenizer_files")
    versions = {match[1]: match[0] for match in (
        re.fullmatch(r"tokenizer\.([1-5](\.[0-9]+)*)\.json", str(name), re.A)
        for name in (files if isinstance(files, list) else ())) if match}
    newest = max(versions, key=lambda v: [int(part) for part in v.split(".")], default=None)
    name = versions.get(newest, "tokenizer.json")
    is_other = (folder / name).is_file() and (
        read_text(folder / name) != read_text(folder / "tokenizer.json"))
    return name if is_other else None


def _as_llama(tokenizer: Tokenizer, c: dict) -> dict:
    """Give tokenizer what transformers' LlamaTokenizer puts in place of tokenizer.json's own ->
    the tokens that it has where tokenizer_config.json, c, names none."""
    from tokenizers import pre_tokenizers

    scheme = "always" if c.get("legacy") else "first"
    if c.get("add_prefix_space") is False:
        scheme = "never"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.model.unk_token = None
    tokenizer.model.fuse_unk = tokenizer.model.byte_fallback = True
    return {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _as_gpt2(tokenizer: Tokenizer, c: dict) -> dict:
    """As `_as_llama`, of transformers' GPT2Tokenizer."""
    from tokenizers import pre_tokenizers

    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(bool(c.get("add_prefix_space")))
    tokenizer.model.unk_token = None
    tokenizer.model.fuse_unk = tokenizer.model.byte_fallback = False
    return dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>") | {
        "pad_token": None}


# Classes that transformers 5 builds anew of tokenizer.json's vocabulary, merges and post_processor.
BUILT_ANEW = {"LlamaTokenizer": _as_llama, "GPT2Tokenizer": _as_gpt2}


def _added_tokens(tokenizer: Tokenizer, folder: Path, c: dict, own: set[str]) -> list[AddedToken]:
    """The tokens that tokenizer_config.json, c, and the older files beside it name, in the order in
    which transformers adds them to those that it has of tokenizer.json, own. New ones get the ids
    that follow the last."""
    from tokenizers import AddedToken

    def token(value, **flags):
        """The AddedToken that a file describes. A string stays one."""
        if not isinstance(value, dict):
            return value
        fields = {k: value[k] for k in FLAGS if k in value}
        return AddedToken(value["content"], **fields | flags)

    # Tokens without a name. Of the two fields that list them the newer one counts, and it may give
    # names after all.
    has_decoder = "added_tokens_decoder" in c
    old = {} if has_decoder else _json_or_nothing(folder / "special_tokens_map.json")
    extra: list = []
    for source in (c, old):
        given = source.get("extra_special_tokens") or {}
        if isinstance(given, dict):  # names and tokens
            c, given = c | given, source.get("additional_special_tokens") or []
        extra = extra or given
    c = c | {k: token(t, special=True) for k, t in old.items() if k.endswith("_token")}

    # Tokens with numbers. These give their order alone, as a number that is taken stays taken.
    if has_decoder:
        added = {int(i): token(t) for i, t in c["added_tokens_decoder"].items()}
    else:
        special = {str(t) for t in (*extra, *map(c.get, NAMED))}
        added = {i: AddedToken(t, normalized=t not in special, special=t in special)
                 for t, i in _json_or_nothing(folder / "added_tokens.json").items()}
        added |= tokenizer.get_added_tokens_decoder()

    # Tokens with names, which are added if no number is given for them.
    if tokenizer.padding:
        c = {"pad_token": tokenizer.padding["pad_token"]} | c

    others = [k for k in c if k.endswith("_token") and k not in NAMED]
    named = [token(c[k]) for k in (*NAMED, *others)
             if isinstance(c.get(k), (str, dict, AddedToken))]
    tokens = [t for _, t in sorted(added.items())]
    present = own | {t.content for t in tokens}
    for t in (*named, *map(token, extra)):
        if str(t) not in present and t not in tokens:
            tokens.append(t)

    # One that was described twice comes twice, and the last description counts.
    tokens = [AddedToken(t, special=True) if isinstance(t, str) else t for t in tokens]
    names = {*map(str, named)}
    for t in tokens:
        if t.content in names and not t.special:
            t.special = True
    return tokens


def _json_or_nothing(path: Path) -> dict:
    """The object in a JSON file, {} if there is no file."""
    return read_json(path, dict) if path.exists() else {}


@contextlib.contextmanager
def _tokenizer_errors(path: str | Path) -> Iterator[None]:
    """Turns any failure of the tokenizers library into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except BaseException as e:
        # A panic of its Rust code is a BaseException, as Ctrl-C is, and its class has no import.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise DataError(f"{path}: not a tokenizer ({e}): fetch it again") from None


class Row(NamedTuple):
    """An example as tokens. The answer's first characters may merge with the question's last ones
    into one token, so ids[:start] is what ids and question have in common."""

    ids: list[int]  # BOS if there is one, context, question, answer, line break
    start: int  # index in ids of the first token that is the answer's
    question: list[int]  # the text without the answer; ids[:start] unless they merge
    context: str  # rows of one context share their beginning
    cut: int  # context tokens that did not fit
    body: int = 0  # index of the question's first token in ids, where the context ends


ASKING = "\nAnswer:"  # what asks for the answer


def question_text(context: str, question: str, asking: str = ASKING) -> str:
    """The paper's template; nothing stands before "Question:" when there is no context."""
    asked = f"Question: {question}{asking}"
    return f"{context}\n{asked}" if context else asked


def answer_text(example: Example) -> str:
    """What follows "Answer:". An unanswerable question's answer is a space, which no tokenizer
    merges with the colon before it. A line break ends an answer, so that inside it becomes a
    space."""
    return " " + one_line(example.answers[0] if example.answers else "") + "\n"


def one_line(answer: str) -> str:
    return " ".join(line.strip() for line in answer.split("\n")) if "\n" in answer else answer


def encode(example: Example, vocabulary: Vocabulary, max_length: int, beginning: str = "",
           asking: str = ASKING) -> Row | None:
    """An example in at most max_length tokens. One that is too long loses words at the context's
    end; None if the rest alone is too long. A text is a row without question; None if it is empty.

    beginning: a text in front of the example's own. asking: what stands between the question and
    the answer, as "\\nSteps: 1 + 1 = 2\\nAnswer:". Neither counts, so that a context is cut alike
    with them and without."""
    context = example.context[:LONGEST_TOKENISED]
    if example.kind == "text":
        all_ids = vocabulary.encode(context)
        ids = all_ids[:max_length]
        row = Row(ids, len(ids), ids, example.context, len(all_ids) - len(ids), len(ids))
        return row if ids else None

    answer = answer_text(example)
    if not _can_be_tokenised(example):
        return None

    # The text is tokenised as a whole, for its parts would merge differently at their ends. So may
    # a shortened context, which is why it takes a loop.
    cut = 0
    while True:
        question = question_text(context, example.question)
        ids, body = vocabulary.encode_at(question + answer, len(context))
        excess = len(ids) - max_length
        if excess <= 0:
            break
        if not context:
            return None
        context, dropped = _shorten(context, excess, vocabulary)
        cut += dropped

    if beginning or asking != ASKING:
        question = beginning + question_text(context, example.question, asking)
        ids, body = vocabulary.encode_at(question + answer, len(beginning) + len(context))
    question_ids = vocabulary.encode(question)
    start = len(common_beginning([ids, question_ids]))
    return Row(ids, start, question_ids, example.context, cut, body)


def surely_fits(example: Example, vocabulary: Vocabulary, max_length: int) -> bool:
    """Whether question and answer fit max_length by their number of bytes, without tokenising. A
    token has at least a byte of the text, unless the tokenizer normalises the text first."""
    if vocabulary.tokenizer.normalizer is not None:
        return False
    characters = len(example.question) + len(answer_text(example)) + len(question_text("", ""))
    # A character has at most 4 bytes; 8 are for BOS and for a space that a tokenizer puts in front.
    return 4 * characters + 8 <= max_length


def sizes(examples: list[Example], vocabulary: Vocabulary) -> Iterator[tuple[float, int]]:
    """(tokens of question and answer without the context, those of them that are the answer's) of
    each example that `encode` would tokenise, else (inf, 0)."""
    for start in range(0, len(examples), 1000):
        chunk = examples[start:start + 1000]
        is_short = [_can_be_tokenised(e) for e in chunk]
        questions = [question_text("", e.question) if short else ""
                     for e, short in zip(chunk, is_short)]
        texts = [q + answer_text(e) if q else "" for q, e in zip(questions, chunk)]
        rows = zip(is_short, vocabulary.encode_batch(questions), vocabulary.encode_batch(texts))
        for short, question_ids, ids in rows:
            answer = len(ids) - len(common_beginning([ids, question_ids]))
            yield (len(ids), answer) if short else (math.inf, 0)


def _can_be_tokenised(example: Example) -> bool:
    return len(example.question) + len(answer_text(example)) <= LONGEST_TOKENISED


def _shorten(context: str, excess: int, vocabulary: Vocabulary) -> tuple[str, int]:
    """The context without its last `excess` tokens, and how many tokens that dropped."""
    offsets = vocabulary.tokenizer.encode(context, add_special_tokens=False).offsets
    keep = max(len(offsets) - excess, 0)
    # Characters that make no token are dropped one by one.
    shorter = context[:offsets[keep][0]].rstrip() if keep < len(offsets) else context
    if shorter == context:
        # The tokens of one character, such as an emoji, share its offsets: drop the character.
        shorter = context[:-1]
    return shorter, len(offsets) - keep


def common_beginning(rows: list[list[int]]) -> list[int]:
    """The longest list that all rows start with."""
    # In lexicographic order the first and the last row are those that differ earliest.
    low, high = min(rows), max(rows)
    differing = (i for i, (a, b) in enumerate(zip(low, high)) if a != b)
    return low[:next(differing, min(len(low), len(high)))]


# --------------------------------------------------------------------------------------------------
# batches


class Order:
    """order[step] -> the indices of that step's `size` rows, a pure function of (seed, step).

    Every epoch shuffles the contexts, and the rows of each, so that questions of one context meet
    in a batch; share=False shuffles single rows. A batch may span two epochs, so none is short."""

    def __init__(self, contexts: list[str], size: int, seed: int, share: bool = True):
        self.count, self.size, self.seed = len(contexts), size, seed
        self.groups = _groups([c if share and c else i for i, c in enumerate(contexts)])
        self._cached_epoch = functools.lru_cache(maxsize=2)(self.epoch)

    def epoch(self, number: int) -> list[int]:
        """All indices once, in the order of this epoch."""
        rng = random.Random(f"{self.seed} {number}")
        groups = rng.sample(self.groups, len(self.groups))
        return [i for group in groups for i in rng.sample(group, len(group))]

    def __getitem__(self, step: int) -> list[int]:
        places = range(step * self.size, (step + 1) * self.size)
        return [self._cached_epoch(p // self.count)[p % self.count] for p in places]


def _groups(keys: list) -> list[list[int]]:
    """The indices of equal keys, in the order of each key's first index."""
    groups: dict = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


class Batch(NamedTuple):
    """A trie of depth two: P distinct beginnings, Q tails that go on from them. int64."""

    shared: Tensor  # (P, Tc), PAD on the right; Tc may be 0
    tails: Tensor  # (Q, Tq), PAD on the right: the rest of the question, and the answer
    parent: Tensor  # (Q,): row of `shared` that a tail goes on from
    labels: Tensor  # (Q, Tq): the token that follows if it is the answer's, else NO_LABEL
    asked: list[list[int]]  # Q tails without the answer, to generate from
    head: Tensor | None = None  # (Q, Th): tokens between a beginning and its tail's prompt

    def to(self, device) -> Batch:
        tensors = [t.to(device) for t in (self.shared, self.tails, self.parent, self.labels)]
        return Batch(*tensors, self.asked, None if self.head is None else self.head.to(device))


def collate(rows: list[Row], share: bool = True, suffix: bool = False) -> Batch:
    """Rows -> a trie whose tails stand in the rows' order. Attention is causal, so what the model
    computes of a beginning does not depend on the tail: loss and gradient are those of whole rows.

    share: rows of one context have one beginning. The last token before an answer is always in the
    tail, as it predicts the answer's first token. suffix: the prompt stands before that token, the
    tail starts there, and `head` holds what lies between the beginning and the prompt."""
    import torch

    # Rows of one context share a beginning, which leaves the last token before the answer to every
    # tail. With suffix it also leaves a token to every head: an empty head is not run through the
    # model, and processes that hold its weights in shards must run the same layers.
    reserved = 2 if suffix else 1
    beginnings, parent = [], [0] * len(rows)
    for members in _groups([row.context if share else i for i, row in enumerate(rows)]):
        for i in members:
            parent[i] = len(beginnings)
        shareable = [rows[i].ids[:max(rows[i].start - reserved, 0)] for i in members]
        beginnings.append(common_beginning(shareable))

    # Divide every row where its head and its tail start. The labels are the tail's tokens one
    # place on, so the row's last token is a label alone.
    heads, tails, labels, asked = [], [], [], []
    for i, row in enumerate(rows):
        head_start = len(beginnings[parent[i]])
        tail_start = row.start - 1 if suffix else head_start
        heads.append(row.ids[head_start:tail_start])
        tails.append(row.ids[tail_start:-1])
        labels.append([NO_LABEL] * (row.start - tail_start - 1) + row.ids[row.start:])
        asked.append(row.question[tail_start:])

    return Batch(_padded(beginnings, PAD), _padded(tails, PAD), torch.tensor(parent),
                 _padded(labels, NO_LABEL), asked, _padded(heads, PAD) if suffix else None)


def _padded(lists: list[list[int]], value: int) -> Tensor:
    """int64 (len(lists), T), filled up with value on the right."""
    import torch

    T = max(map(len, lists))
    return torch.tensor([ids + [value] * (T - len(ids)) for ids in lists], dtype=torch.int64)


# --------------------------------------------------------------------------------------------------
# scores


def score(example: Example, prediction: str | None) -> dict[str, float]:
    """Scores of a prediction, 0 to 1, the best over all accepted answers; None, a missing one, has
    0. Kind "squad" has those of evaluate-v2.0.py, "choice" has accuracy, whatever the case of
    letters, others have accuracy and accuracy_value."""
    judge = functools.partial(_score_value, example)
    golds = list(example.answers)
    if example.kind == "choice":
        judge = _score_choice
    if example.kind == "squad":
        judge = _score_text
        # v2.0 drops golds that are empty once normalised; without golds the right answer is ""
        golds = [gold for gold in golds if normalize(gold)] or [""]
    if prediction is None:
        return dict.fromkeys(judge("x", "x"), 0.0)

    scores = [judge(prediction, gold) for gold in golds]
    best = {key: max(s[key] for s in scores) for key in scores[0]}
    if example.kind == "squad":  # precision and recall are those of the gold with the best F1
        top = max(scores, key=lambda s: s["f1"])
        best.update(precision=top["precision"], recall=top["recall"])
    return best


def mean_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means in percent, as the SQuAD script gives them; {} of no scores."""
    keys = scores[0] if scores else ()
    return {key: 100 * sum(s[key] for s in scores) / len(scores) for key in keys}


def normalize(text: str) -> str:
    """SQuAD's normalisation, in its order: lower case, ASCII punctuation out, articles out,
    spaces squeezed."""
    text = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _score_text(prediction: str, gold: str) -> dict[str, float]:
    """SQuAD's scores of a bag of words."""
    p, g = normalize(prediction).split(), normalize(gold).split()
    exact_match = float(p == g)
    common = sum((Counter(p) & Counter(g)).values())
    if not p or not g:  # v2.0: an empty answer is right only where an empty one is expected
        precision = recall = f1 = exact_match
    elif common == 0:
        precision = recall = f1 = 0.0
    else:
        precision, recall = common / len(p), common / len(g)
        f1 = 2 * precision * recall / (precision + recall)
    return {"exact_match": exact_match, "precision": precision, "recall": recall, "f1": f1}


def _score_choice(prediction: str, gold: str) -> dict[str, float]:
    same = prediction.strip(" .").casefold() == one_line(gold).strip(" .").casefold()
    return {"accuracy": float(same)}


def _score_value(example: Example, prediction: str, gold: str) -> dict[str, float]:
    """accuracy: the same string, DeepMind's own measure. accuracy_value: the same number, or of
    MATH the same answer in another spelling."""
    gold = one_line(gold)
    exact = prediction.strip() == gold.strip()
    # In another base the digits are not those of a decimal: 98 in base 14 is not 98.0.
    in_base = re.search(r"\bbase\s+[0-9]+", example.question, re.IGNORECASE)
    number = value(prediction)
    equal = number is not None and number == value(gold) and not in_base
    if example.kind == "hendrycks":
        equal = equal or plain_math(prediction) == plain_math(gold) != ""
    return {"accuracy": float(exact), "accuracy_value": float(exact or equal)}


def value(text: str) -> Fraction | None:
    """An integer, a decimal or a fraction, a/b or \\frac{a}{b}, as `plain_math` leaves it; None for
    anything else."""
    text = re.sub(r"^([+-]?)\\frac\{([+-]?[0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", plain_math(text))
    is_number = re.fullmatch(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(/[+-]?[0-9]+)?", text)
    if not is_number or len(text) > 1000:  # Python refuses to read numbers of very many digits
        return None
    numerator, _, denominator = text.partition("/")
    divisor = Fraction(denominator or 1)
    return Fraction(numerator) / divisor if divisor else None


# What may be written in several ways in an answer of MATH (Hendrycks et al. 2021, is_equiv), in the
# order in which it is replaced.
SPELLINGS = [
    (r"\\[!,;:]|\\ |\\\$|\$|\\left|\\right|\^\{?\\circ\}?", ""),  # spaces, dollars, sizes, degrees
    (r"\{,\}", ","),
    (r"(?<=\S)\\(text|mbox)\{\s[^{}]*\}(\^\{?[23]\}?)?$", ""),  # a unit
    (r"(?<=\S)\\?%", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*([0-9a-z])\s*([0-9a-z])", r"\\frac{\1}{\2}"),
    (r"\\frac\s*([0-9a-z])\s*\{", r"\\frac{\1}{"),
    (r"\\frac\{([^{}]*)\}\s*([0-9a-z])", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s*([0-9a-z])", r"\\sqrt{\1}"),
    (r"(?<![0-9])\s+|\s+(?![0-9])", ""),  # not between two numbers
    (r"^[a-z]=(?=[^=]+$)", ""),
    (r"^([+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?)$", lambda m: m[1].replace(",", "")),
]


def plain_math(text: str) -> str:
    """An answer in the one of its spellings that stands for all: \\dfrac12 is \\frac{1}{2}, 1,000
    is 1000, \\$5 is 5, 50\\% is 50, and x=5 is 5."""
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text.strip())
    return text
