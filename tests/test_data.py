"""data.py: formats, tokens, tries and scores."""

import csv
import gzip
import itertools
import json
import random
import re
import shutil
import string
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import data
import llama
from lab.loss import answer_loss


def obey(e, cwd):
    """Run the command that an error names, and return the path that it then says to give."""
    command, target = re.search(r"`(.*)` and give (.*)$", str(e.value)).groups()
    if command.startswith("python "):
        command = f"'{sys.executable}' {command.removeprefix('python ')}"
    elif not shutil.which(command.split()[0]):
        pytest.skip(f"no {command.split()[0]} here")
    subprocess.run(["sh", "-c", command], check=True, cwd=cwd)
    return target


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# --------------------------------------------------------------------------------------------------
# formats

NESTED = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{
    "context": "In Ülm lives a cat.", "qas": [
        {"id": "1", "question": "Who?", "answers": [{"text": "a cat", "answer_start": 13},
                                                    {"text": "cat", "answer_start": 15}]},
        {"id": "2", "question": "Why?", "is_impossible": True, "answers": [],
         "plausible_answers": [{"text": "x"}]}]}]}]}
FLAT = [{"id": q["id"], "title": "t", "context": "In Ülm lives a cat.", "question": q["question"],
         "answers": {"text": [a["text"] for a in q["answers"]], "answer_start": []}}
        for q in NESTED["data"][0]["paragraphs"][0]["qas"]]
PARAGRAPHS = [{**paragraph, "title": "t"} for paragraph in NESTED["data"][0]["paragraphs"]]
HUB = {"features": [{"feature_idx": i, "name": key, "type": {"dtype": "string"}}
                    for i, key in enumerate(FLAT[0])],
       "rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(FLAT)],
       "num_rows_total": 2, "num_rows_per_page": 100, "partial": False}


@pytest.mark.parametrize("text", [
    json.dumps(NESTED), "\ufeff" + json.dumps(NESTED, indent=2, ensure_ascii=False),
    json.dumps(FLAT),
    "\n".join(map(json.dumps, FLAT)), "\r\n".join(map(json.dumps, FLAT)) + "\r\n",
    json.dumps({key: [row[key] for row in FLAT] for key in FLAT[0]}),
    json.dumps({key: {str(i): row[key] for i, row in enumerate(FLAT)} for key in FLAT[0]}),
    json.dumps({**{key: [row[key] for row in FLAT] for key in FLAT[0]},
                "answers": [[{"text": text} for text in row["answers"]["text"]] for row in FLAT]}),
    json.dumps({row["id"]: row for row in FLAT}),
    json.dumps({"train": FLAT}), json.dumps({"name": "n", "licences": ["l"], "instances": FLAT}),
    json.dumps({"examples": PARAGRAPHS}), json.dumps({"questions": FLAT, "errors": []}),
    json.dumps(HUB), json.dumps(HUB, indent=1), json.dumps(HUB["rows"]),
    "\n".join(map(json.dumps, HUB["rows"]))])
def test_squad(tmp_path, text):
    first, second = data.read("squad", write(tmp_path / "x.json", text))
    assert first == data.Example("1", "squad", "In Ülm lives a cat.", "Who?", ("a cat", "cat"), "t")
    assert second.answers == ()


ONE = {"id": "1", "context": "In Ülm lives a cat.", "question": "Who?"}


@pytest.mark.parametrize("records", [
    PARAGRAPHS, {"version": "0.1", "data": FLAT}, {"data": PARAGRAPHS},
    [{**ONE, "answers": [{"text": "a cat"}, {"text": "cat"}]}],
    [{**ONE, "answers": ["a cat", "cat"]}],
    [{**ONE, "answer": ["a cat", "cat"]}], [{**ONE, "answers": {"text": ["a cat", "cat"]}}]])
def test_questions_as_people_have_them(tmp_path, records):
    examples = data.read("squad", write(tmp_path / "x.json", json.dumps(records)))
    assert examples[0] == data.Example(
        "1", "squad", "In Ülm lives a cat.", "Who?", ("a cat", "cat"), examples[0].source)
    assert len(examples) == 1 or examples[1].answers == ()


@pytest.mark.parametrize("written, read", [
    ("72", ("72",)), ("-1.50", ("-1.50",)), ("[1e3, 0.10]", ("1e3", "0.10")),
    ('{"text": [72], "answer_start": [5]}', ("72",)), ('[{"text": 7}]', ("7",)),
    ("9" * 5000, ("9" * 5000,))])
def test_an_answer_that_is_a_number_is_read_as_it_is_written(tmp_path, written, read):
    """By every kind of file and of question that has answers in words."""
    record = f'{{"context": "c", "question": "How many?", "answer": {written}}}'
    for name, text in {"x.jsonl": record + "\n" + record, "y.json": f"[{record}]",
                       "z.json": f'{{"rows": [{{"row": {record}}}]}}'}.items():
        for kind in ("squad", "math"):
            assert data.read(kind, write(tmp_path / name, text))[0].answers == read


@pytest.mark.parametrize("kind", ["squad", "math"])
@pytest.mark.parametrize("answer", ["true", "[false]", '[{"text": true}]'])
def test_an_answer_that_is_true_asks_for_its_word(tmp_path, kind, answer):
    """Done so, or read as multiple choice, it is read."""
    record = f'{{"context": "c", "question": "Is it?", "answer": {answer}}}'
    with pytest.raises(data.DataError, match='in quotes, such as "yes" or "True"; or') as e:
        data.read(kind, write(tmp_path / "x.json", record))
    assert re.search("the answer is (true|false), which is no text", str(e.value))
    word = record.replace("true", '"yes"').replace("false", '"no"')
    assert data.read(kind, write(tmp_path / "x.json", word))[0].answers in (("yes",), ("no",))
    both = [{"context": "c", "question": "Is it?", "answer": answer} for answer in (True, False)]
    assert data.read("choice", write(tmp_path / "y.json", json.dumps(both)))[0].answers == ("yes",)


def test_of_several_lists_of_records_one_is_chosen(tmp_path):
    """By the command that the error names, which works for any name of a file."""
    splits = {"validation": FLAT[:1], "train": FLAT, "x; touch y": FLAT, "none": []}
    folder = tmp_path / "it's $(touch z)"
    folder.mkdir()
    with pytest.raises(data.DataError, match="'validation', 'train', 'x; touch y'") as e:
        data.read("squad", write(folder / "x.json", "\ufeff" + json.dumps(splits)))
    target = obey(e, tmp_path)
    assert target == str(folder / "x.json.train.jsonl")
    assert data.read("squad", target) == data.read(
        "squad", write(folder / "y.json", json.dumps(FLAT)))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "x.json", "x.json.train.jsonl", "y.json"]


@pytest.mark.parametrize("answer, read", [
    ("a cat", ("a cat",)), ("[cat", ("[cat",)), ("", ()), ('["a \\/ x", "b"]', ("a / x", "b")),
    ("[1.50, 72]", ("1.50", "72")), ("{'text': [72]}", ("72",)), ("{'text': [True]}", False),
    ("{'text': ['a cat'], 'answer_start': [13]}", ("a cat",)),
    ('["a cat", "cat"]', ("a cat", "cat")), ("a, b", ("a, b",)),
    # What begins as a list does may be a plain text, and as a list of texts a spoiled one.
    ("[Applause]", ("[Applause]",)), ("[0, 1)", ("[0, 1)",)), ("{1, 2}", ("{1, 2}",)),
    ("[open('/etc/passwd')]", ("[open('/etc/passwd')]",)), ("[" * 2 + "a" * 2**17, None),
    ("{'text': array(['a'])}", None), ("['a', 'b", None), ("['a' 'b']", None),
    ("[array(['a'])]", None), ("[{'text': nan}]", None)])
@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".tsv", "\t")])
def test_tables_of_questions(tmp_path, suffix, delimiter, answer, read):
    path = tmp_path / f"x{suffix}"
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([["id", "context", "question", "answers"],
                         ["1", "Two\nlines, a cat.", "Who?", answer]])
    if not isinstance(read, tuple):
        message = "export the table as JSON lines" if read is None else "answer is true, which is"
        with pytest.raises(data.DataError, match=message):
            data.read("squad", str(path))
    else:
        assert data.read("squad", str(path)) == [
            data.Example("1", "squad", "Two\nlines, a cat.", "Who?", read)]


def test_a_quote_that_is_not_closed_does_not_swallow_the_table(tmp_path):
    path = write(tmp_path / "x.csv", 'id,context,question,answers\n1,c,q,"a\n2,c,q,b\n')
    with pytest.raises(data.DataError, match="not a table"):
        data.read("squad", path)


@pytest.mark.parametrize("mark", [",", ";", "|", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".tsv"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_the_first_line_shows_what_divides_a_table(tmp_path, mark, suffix, quoting):
    """Unless it shows several marks."""
    names = ["id", "context", "question", "answers", "kind, place; or |time\t|"]
    fields = ["1", "A cat; a dog, a cow.\n|\tEnd", "Who?", "a cat; a, b", "k"]
    for count in (4, 5):
        with (tmp_path / f"x{suffix}").open("w", newline="") as file:
            csv.writer(file, delimiter=mark, quoting=quoting).writerows(
                [names[:count], fields[:count]])
        assert data.read("squad", str(tmp_path / f"x{suffix}")) == [data.Example(
            "1", "squad", "A cat; a dog, a cow.\n|\tEnd", "Who?", ("a cat; a, b",))]


def test_a_first_line_that_shows_several_marks_is_divided_as_its_ending_says(tmp_path):
    path = write(tmp_path / "x.csv", "context,question,answers,a;b|c\nc,q,a,\n")
    assert data.read("squad", path)[0].answers == ("a",)
    path = write(tmp_path / "x.tsv", "context\tquestion\tanswers, all\tanswer\nc\tq\t\ta\n")
    assert data.read("squad", path)[0].answers == ("a",)


def test_tables_of_problems(tmp_path):
    """What only looks like a list is a text where no lists are expected."""
    path = write(tmp_path / "x.csv", 'question;answer\nHow many?;"2 + 2 = 4\n#### 4"\n')
    assert [e.answers for e in data.read("gsm8k", path)] == [("4",)]
    path = write(tmp_path / "x.CSV", "question,answer\nb'1 + 1?\\n',b'2\\n'\nWhere?,[0\n")
    assert [(e.question, e.answers) for e in data.read("math", path)] == [
        ("1 + 1?", ("2",)), ("Where?", ("[0",))]
    path = write(tmp_path / "x.tsv", "problem\tsolution\tanswer\np\tso \\boxed{[0,1)}\t[0,1)\n")
    assert [e.answers for e in data.read("hendrycks", path)] == [("[0,1)",)]


@pytest.mark.parametrize("kind, name, text", [
    ("squad", "X.JSON", json.dumps(FLAT)), ("squad", "X.JSONL", json.dumps(FLAT[0])),
    ("squad", "X.TSV", "context\tquestion\tanswers\nc\tq\ta\n"),
    ("squad", "X.Csv", "context,question,answers\nc,q,a\n"), ("math", "X.TXT", "1 + 1\n2\n"),
    ("math", "X.JSON", '[{"question": "1 + 1", "answer": "2"}]'),
    ("text", "X.JSONL", '{"text": "t"}'), ("text", "X.TXT", "t"),
    ("text", "X.JSON.GZ", gzip.compress(b'{"text": "t"}', mtime=0))])
def test_endings_in_upper_case(tmp_path, kind, name, text):
    lower = data.read(kind, write(tmp_path / name.lower(), text))
    (tmp_path / name.lower()).unlink()
    for path in (write(tmp_path / name, text), str(tmp_path)):
        assert [e._replace(id="", source="") for e in data.read(kind, path)] == [
            e._replace(id="", source="") for e in lower]


def test_gsm8k(tmp_path):
    record = {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}
    assert data.read("gsm8k", write(tmp_path / "x.jsonl", json.dumps(record))) == [
        data.Example("x-0", "gsm8k", "", "How many?", ("1004",), rationale="2 + 2 = <<2+2=4>>4")]
    for written, number in (("$1,004", "1004"), ("-3.50", "-3.50"), ("50%", "50"), ("7.", "7")):
        path = write(tmp_path / "x.jsonl", json.dumps({**record, "answer": f"so\n#### {written} "}))
        assert data.read("gsm8k", path)[0].answers == (number,)
    for answer in ("4", 4):
        path = write(tmp_path / "y.jsonl", json.dumps({**record, "answer": answer}))
        with pytest.raises(data.DataError, match="no #### with a number.*as math:PATH"):
            data.read("gsm8k", path)
        assert data.read("math", path)[0].answers == ("4",)  # as the line says


CHOICES = {  # name -> (record, the example's context, question, answer, choices)
    "BoolQ": ({"question": "Is it?", "passage": "It is.", "answer": True},
              "It is.", "Is it?", "yes", ("no", "yes")),
    "BoolQ as columns": ({"question": ["Is it?"], "passage": ["It is."], "answer": [True]},
                         "It is.", "Is it?", "yes", ("no", "yes")),
    "SST-2": ({"sentence": "a fine film", "label": 1}, "", "a fine film", "1", ("0", "1")),
    "with names": ({"text": "a fine film", "label": 1, "label_text": "good"},
                   "", "a fine film", "good", ("bad", "good")),
    "pairs": ({"premise": "It rains.", "hypothesis": "It is wet.", "label": 1.0},
              "It rains.", "It is wet.", "1", ("0", "1")),
    "ARC of the hub": ({"id": "M1", "question": "Which?", "answerKey": "2", "choices": {
        "text": ["one", "two"], "label": ["1", "2"]}}, "", "Which?\nA. one\nB. two", "B", "AB"),
    "ARC": ({"question": {"stem": "Which?", "choices": [
        {"text": "one", "label": "C"}, {"text": "two", "label": "A"}]}, "answerKey": "C"},
        "", "Which?\nA. one\nB. two", "A", "AB"),
    "MMLU": ({"question": "Which?", "choices": ["2", "1", "0"], "answer": 1, "subject": "x"},
             "", "Which?\nA. 2\nB. 1\nC. 0", "B", "ABC"),
    "RACE": ({"article": "It is.", "question": "Which?", "options": ["one", "two"], "answer": "B"},
             "It is.", "Which?\nA. one\nB. two", "B", "AB"),
    "HellaSwag": ({"ctx": "He then", "endings": ["runs.", "\nsits."], "label": "1"},
                  "", "He then\nA. runs.\nB.  sits.", "B", "AB"),
    "MedQA": ({"question": "Which?", "options": {"A": "one", "B": "two"}, "answer": "two"},
              "", "Which?\nA. one\nB. two", "B", "AB"),
    "QNLI": ({"question": "Where?", "sentence": "In Tarn.", "label": 1},
             "In Tarn.", "Where?", "1", ("0", "1")),
    "numbered from 0": ({"question": "Which?", "answer": 0, "choices": {
        "label": ["A", "B"], "text": ["one", "two"]}}, "", "Which?\nA. one\nB. two", "A", "AB"),
    "a count as pandas writes it": (
        {"question": "Which?", "choices": ["1", "2", "3"], "label": 1.0},
        "", "Which?\nA. 1\nB. 2\nC. 3", "B", "ABC"),
    "true of its own choices": ({"question": "Is it?", "choices": ["no", "yes"], "answer": True},
                                "", "Is it?\nA. no\nB. yes", "B", "AB"),
    "true in words": ({"question": "Is it?", "choices": ["True", "False"], "answer": "True"},
                      "", "Is it?\nA. True\nB. False", "A", "AB"),
    "numbers to choose from": ({"question": "Which?", "choices": [1.50, 72], "answer": 1},
                               "", "Which?\nA. 1.5\nB. 72", "B", "AB"),
    "by its text": ({"question": "Which?", "options": ["one", "two"], "answer": "two"},
                    "", "Which?\nA. one\nB. two", "B", "AB")}
OTHER_LABEL = {"BoolQ": {"answer": False}, "BoolQ as columns": {"answer": [False]},
               "SST-2": {"label": 0}, "QNLI": {"label": 0}, "pairs": {"label": 0.0},
               "with names": {"label_text": "bad"}}


@pytest.mark.parametrize("name", CHOICES)
def test_multiple_choice(tmp_path, name):
    record, context, question, answer, choices = CHOICES[name]
    records = [record, {**record, **OTHER_LABEL.get(name, {})}]
    if name == "BoolQ as columns":
        records = {key: value + records[1][key] for key, value in record.items()}
    first = data.read("choice", write(tmp_path / "x.json", json.dumps(records)))[0]
    id_ = "M1" if "id" in record else "x-0"
    assert first == data.Example(id_, "choice", context, question, (answer,),
                                 choices=tuple(choices))


def test_a_table_of_labels_and_of_printed_choices(tmp_path):
    path = write(tmp_path / "x.tsv", "sentence\tlabel\na fine film\tTrue\na dull one\tFalse\n")
    assert [e.answers for e in data.read("choice", path)] == [("yes",), ("no",)]
    path = write(tmp_path / "x.csv", "question,choices,answer\nWhich?,\"['one', 'two']\",two\n")
    assert data.read("choice", path)[0].answers == ("B",)


@pytest.mark.parametrize("change, message", [
    ({"answer": "0"}, "names 2 of its 2 choices"), ({"answer": 2}, "names 0 of its 2 choices"),
    ({"answer": None}, "None is no right answer"), ({"answer": -1}, "no right answer"),
    ({"choices": ["1"]}, "expected 2 to 26 texts"), ({"choices": [["1"], "2"]}, "2 to 26 texts"),
    ({"choices": "['1' '2']"}, "are no Python or JSON value"),
    ({"choices": {"A": "1", "B": ["2"]}}, "expected 2 to 26 texts"),
    ({"choices": None}, "1 different labels"),
    ({"question": 3}, "'question' is Number")])
def test_choices_that_name_no_answer(tmp_path, change, message):
    record = {"question": "Which?", "choices": ["1", "0"], "answer": 0, **change}
    with pytest.raises(data.DataError, match=message):
        data.read("choice", write(tmp_path / "x.json", json.dumps([record])))


@pytest.mark.parametrize("names", [
    ("choice1", "choice2"), ("option_1", "option_2"), ("answerA", "answerB"), ("opa", "opb"),
    ("ending0", "ending1")])
@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_choices_with_a_field_each_are_not_passed_over(tmp_path, names, suffix):
    """What the line says to write is read."""
    record = {"question": "Which?", **dict(zip(names, ("one", "two"))), "label": "0"}
    table = "\n".join([",".join(record), ",".join(record.values())])
    path = write(tmp_path / f"x{suffix}", json.dumps(record) if suffix == ".json" else table)
    with pytest.raises(data.DataError, match=f"a field each, {', '.join(names)}: write them as"):
        data.read("choice", path)
    for answer in ("two", 1):
        record = {"question": "Which?", "choices": ["one", "two"], "label": answer}
        assert data.read("choice", write(tmp_path / "y.json", json.dumps(record)))[0].answers == (
            "B",)


def test_a_record_without_a_label_says_what_it_has(tmp_path):
    path = write(tmp_path / "x.csv", "review,sentiment\ngood,positive\n")
    with pytest.raises(data.DataError, match="no 'label', only 'review', 'sentiment': rename"):
        data.read("choice", path)
    path = write(tmp_path / "y.csv", "text,label\ngood,positive\nbad,negative\n")
    assert data.read("choice", path)[0].answers == ("positive",)


def test_the_score_of_a_choice_is_blind_to_case():
    example = data.Example("", "choice", "", "q", ("Yes",), choices=("Yes", "No"))
    scores = [data.score(example, text)["accuracy"] for text in ("yes.", "Yes", "no", "")]
    assert scores == [1, 1, 0, 0] and data.score(example, None) == {"accuracy": 0}


def test_of_deepminds_archive_the_modules_are_read(tmp_path):
    """Not its readme. A folder whose files have other names is read whole."""
    for split in ("interpolate", "train-easy"):
        (tmp_path / split).mkdir()
        write(tmp_path / split / "arithmetic__mul.txt", "What is 2 * 3?\n6\n\n")
    write(tmp_path / "train-readme.txt", "one\ntwo\nthree\n")
    for path in (tmp_path, tmp_path / "**", tmp_path / "**/*.txt"):
        assert [e.id for e in data.read("math", str(path))] == [
            "interpolate/arithmetic__mul-0", "train-easy/arithmetic__mul-0"]
    with pytest.raises(data.DataError, match="3 lines"):  # as it was asked for
        data.read("math", str(tmp_path / "train-readme.txt"))


def test_a_readme_is_no_sum_and_hidden_files_are_no_data(tmp_path):
    for name in ("sums.txt", "README.txt", "._sums.txt", "__MACOSX/a__b.txt", "my-Licence.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "1 + 1\n2\n")
    assert data.files_of("math", str(tmp_path)) == [tmp_path / "sums.txt"]
    assert data.files_of("text", str(tmp_path)) == [
        tmp_path / "README.txt", tmp_path / "my-Licence.txt", tmp_path / "sums.txt"]


@pytest.mark.parametrize("start", [
    b"PAR1\x15\x04\xff", b"ARROW1\0\0", b"\xff\xff\xff\xff\x10", b"PK\3\4\x14\0", b"\x1f\x8b\x08",
    b"\x89HDF\r\n\x1a\n", b"7z\xbc\xaf\x27\x1c\0\4", b"SQLite format 3\0", b"\x80\4\x95",
    b"BZh91AY&SY\xff"])
@pytest.mark.parametrize("kind, name", [
    ("squad", "x.json"), ("squad", "x.csv"), ("math", "x.txt"), ("text", "x.json"),
    ("text", "x.txt")])
def test_what_is_no_text_is_said_to_be_none(tmp_path, kind, name, start):
    with pytest.raises(data.DataError, match="UTF-8|utf-8|NUL") as e:
        data.read(kind, write(tmp_path / name, start + b" " * 50))
    assert name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("one, other", [
    (r"\frac12", r"\frac{1}{2}"), (r"\dfrac{1}{2}", "0.5"), ("1,000", "1000"), (r"\$5", "5"),
    (r"14,\!400", "14400"), (r"1{,}000", "1,000"), (r"50\%", "50"), ("x=5", "5"),
    (r"\frac1{72}", "1/72"), (r"90^\circ", "90"),
    (r"12\text{ cm}", "12"), (r"12\text{ cm}^2", "12"), (r"7\mbox{ m}^{3}", "7"),
    (r"\sqrt3", r"\sqrt{3}"), (r"\left( 1, 2\right)", "(1,2)"),
    ("-.5", r"-\frac{1}{2}"), (r"\frac{-1}{2}", r"-\frac{1}{2}")])
def test_spellings_of_one_answer(one, other):
    gold = data.Example("0", "hendrycks", "", "q", (other,))
    assert data.score(gold, one)["accuracy_value"] == 1
    assert data.score(gold._replace(answers=(one,)), other)["accuracy_value"] == 1
    assert data.score(gold, one + "1")["accuracy_value"] == 0


def test_an_answer_of_which_nothing_is_left_equals_none():
    gold = data.Example("0", "hendrycks", "", "q", (r"\text{ even}",))
    for prediction in ("", r"\text{ odd}", "%"):
        assert data.score(gold, prediction)["accuracy_value"] == 0
    for one, other in (("x=1,y=2", "y=1,y=2"), ("(1,200)", "(1200)"), (r"2\ 3", "2,3")):
        assert data.score(gold._replace(answers=(one,)), other)["accuracy_value"] == 0


def test_other_answers_are_others():
    gold = data.Example("0", "math", "", "q", ("12",))
    for prediction in ("1 2", "1,2", "12, 12", "x", r"\text{ cm}", "1.2"):
        assert data.score(gold, prediction)["accuracy_value"] == 0


def test_answers_of_several_lines_become_one(vocabulary):
    e = squad("the\nvalley of Tarn", "q", "the\n valley")
    row = data.encode(e, vocabulary, 1000)
    assert vocabulary.decode(row.ids[row.start:]).endswith(" the valley\n")
    assert data.score(e, "the valley")["exact_match"] == 1
    gold = data.Example("0", "math", "", "q", ("1\n2",))
    assert data.score(gold, "1 2")["accuracy"] == 1


def test_math(tmp_path):
    write(tmp_path / "arithmetic__b.txt", "What is 1 + 1?\n2\n-3 * -129\n387\n")
    write(tmp_path / "arithmetic__a.txt", "Divide 59 by 9.\r\n59/9\r\n")
    folder = [(e.question, e.answers[0]) for e in data.read("math", str(tmp_path))]
    assert folder == [("Divide 59 by 9.", "59/9"), ("What is 1 + 1?", "2"), ("-3 * -129", "387")]
    assert len(data.read("math", str(tmp_path / "*__b.txt"))) == 2
    assert [e.source for e in data.read("math", str(tmp_path))] == [
        f"{tmp_path.name}/arithmetic__{module}" for module in "abb"]
    rows = [{"question": "b'What is \"1\" + 1?\\n'", "answer": "b'2\\n'"},
            {"question": "b", "answer": "b'x"}]
    examples = data.read("math", write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows))))
    assert [(e.question, e.answers) for e in examples] == [
        ('What is "1" + 1?', ("2",)), ("b", ("b'x",))]


@pytest.mark.parametrize("solution, answer", [
    (r"so \boxed{1}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"$\boxed 7$", "7"),
    (r"\fbox{a{b}c}", "a{b}c"), (r"\boxed {x^{2}}", "x^{2}"), ("none", None), (r"\boxed{1", None)])
def test_hendrycks(tmp_path, solution, answer):
    assert data.last_boxed(solution) == answer
    (tmp_path / "algebra").mkdir()
    write(tmp_path / "algebra" / "1.json",
          json.dumps({"problem": "p", "level": "Level 1", "solution": solution}))
    if answer is None:
        with pytest.raises(data.DataError, match="boxed"):
            data.read("hendrycks", str(tmp_path))
    else:
        assert data.read("hendrycks", str(tmp_path)) == [
            data.Example("algebra/1", "hendrycks", "", "p", (answer,), rationale=solution)]


def test_text_is_streamed(tmp_path):
    lines = [json.dumps({"text": f"page {i}", "timestamp": "", "url": ""}) + "\n" for i in range(6)]
    two_members = (gzip.compress("".join(lines[:3]).encode())
                   + gzip.compress("".join(lines[3:]).encode()))
    path = write(tmp_path / "c4-train.00000-of-01024.json.gz", two_members)
    assert [e.context for e in data.read("text", path)] == [f"page {i}" for i in range(6)]
    broken = write(tmp_path / "broken.json.gz", two_members[:-9])  # the end is never reached
    assert len(data.read("text", broken, limit=2)) == 2
    with pytest.raises(data.DataError, match="broken"):
        data.read("text", broken)
    array = write(tmp_path / "array.json", "[\n" + ",\n".join(lines) + "]")
    assert [e.context for e in data.read("text", array)] == [f"page {i}" for i in range(6)]
    with pytest.raises(data.DataError, match="record 1: 'text' is Number, expected a text"):
        data.read("text", write(tmp_path / "array.json", '[{"text": 5}]'))
    plain = write(tmp_path / "plain.txt", "one\ntwo\n\n\nthree\n")
    assert [e.context for e in data.read("text", plain)] == ["one\ntwo", "three"]


BAD = {
    "squad: arithmetic": ("squad", "x.json", "What is 1?\n1\n", "not JSON"),
    "squad: other json": ("squad", "x.json", '{"a": 1}',
                          "no 'answers' and no 'answer', only 'a': rename"),
    "squad: other names": ("squad", "x.csv", "Context,question,answer\nc,q,a\n",
                           "line 2: no 'context', only 'Context', 'question', 'answer': rename"),
    "squad: no table by its name": ("squad", "x.txt", "context,question,answer\nc,q,a\n",
                                    "not JSON, and a table's name ends in .csv or .tsv"),
    "squad: no texts": ("squad", "x.json", '[{"context": "c", "question": "q", "answers": [[1]]}]',
                        "'answers' are .*1.*, expected texts or numbers"),
    "squad: no answers": ("squad", "x.json",
                          '{"data": [{"paragraphs": [{"context": "c", '
                          '"qas": [{"question": "q"}]}]}]}',
                          "record 1 paragraph 0: no 'answers'"),
    "squad: wrong type": ("squad", "x.json",
                          '{"data": [{"paragraphs": [{"context": 3, "qas": []}]}]}',
                          "'context' is Number"),
    "squad: empty": ("squad", "x.json", '{"data": [{"paragraphs": []}]}', "no examples"),
    "math: odd": ("math", "x.txt", "1 + 1\n2\n1 + 2\n",
                  "3 lines.*even number; line 3 has no answer"),
    "math: blank": ("math", "x.txt", "1 + 1\n2\n\n3\n", "line 3: empty"),
    "math: a line between": ("math", "x.txt", "1 + 1\n2\n\n1 + 2\n3\n", "line 3: empty.*delete it"),
    "math: empty": ("math", "x.txt", "", "no examples"),
    "ragged table": ("squad", "x.csv", "context,question,answers\na,b\n",
                     "line 2: not as many fields"),
    "math: binary": ("math", "x.txt", b"\xff\xfe\x00", "UTF-8"),
    "text: not json": ("text", "x.jsonl", '{"text": "a"}\n{"text"\n', "line 2: not JSON"),
    "text: no text": ("text", "x.jsonl", '{"body": "a"}\n', "line 1: no 'text'"),
    "text: not gzip": ("text", "x.json.gz", "plain", "cannot be read"),
    "ragged columns": ("math", "x.json", '{"question": ["a", "b"], "answer": ["1"]}',
                       "differ in length"),
    "deep": ("squad", "x.json", "[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    kind, file, text, message = BAD[name]
    with pytest.raises(data.DataError, match=message) as e:
        data.read(kind, write(tmp_path / file, text))
    assert file in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("kind", [k for k, reader in data.READERS.items() if k != "text"])
@pytest.mark.parametrize("text, what", [('["x"]', "str"), ("null", "NoneType"), ("[[]]", "list")])
def test_records_that_are_no_objects(tmp_path, kind, text, what):
    with pytest.raises(data.DataError, match=f"record 1: holds {what}, expected an object with"):
        data.read(kind, write(tmp_path / "x.json", text))


def test_a_folder_or_glob_is_read_in_order_and_to_any_depth(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("b/c/2.txt", "a.txt", "b/1.txt", "b/note.md", ".hidden.txt"):
        write(tmp_path / name, "q\n1\n")

    def names(path):
        return [str(p.relative_to(tmp_path)) for p in data.files_of("math", str(path))]

    assert names(tmp_path) == ["a.txt", "b/1.txt", "b/c/2.txt"]
    assert names(tmp_path / "*.txt") == ["a.txt"]
    assert names(tmp_path / "**" / "*.txt") == ["a.txt", "b/1.txt", "b/c/2.txt"]
    assert names(tmp_path / "**") == ["a.txt", "b/1.txt", "b/c/2.txt", "b/note.md"]
    assert names(tmp_path / "b" / "note.md") == ["b/note.md"]


def test_a_fault_is_reported_at_its_line_behind_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "x.txt", b"\xef\xbb\xbfone\ntwo\n\xff\n")
    with pytest.raises(data.DataError, match="line 3: not UTF-8 text .*byte 0xff"):
        data.read("math", path)


def test_nothing_found(tmp_path):
    for path in (tmp_path / "absent", tmp_path / "*.txt", tmp_path):
        with pytest.raises(data.DataError, match="nothing found"):
            data.read("math", str(path))


# --------------------------------------------------------------------------------------------------
# tokens


@pytest.fixture
def vocabulary(tmp_path):
    """A token a character, a few merges across each seam of the template, BOS by post-processor."""
    merges = [("r", ":"), ("?", "Ċ"), (":", "Ċ"), ("e", "r:"), ("Ġ", "x")]
    tokens = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()),
              *(a + b for a, b in merges)]
    t = Tokenizer(models.BPE({piece: i for i, piece in enumerate(tokens)}, merges))
    t.add_special_tokens(["<bos>", "<eos>"])
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.post_processor = processors.TemplateProcessing(single="<bos> $A",
                                                     special_tokens=[("<bos>", 0)])
    t.decoder = decoders.ByteLevel()
    t.enable_truncation(5)  # published tokenizers carry such settings; they must not apply
    t.enable_padding(length=50, pad_id=1, pad_token="<eos>")
    t.save(str(tmp_path / "tokenizer.json"))
    return data.Vocabulary(tmp_path, (1,))


def squad(context="c", question="q", *answers, id="0"):
    return data.Example(id, "squad", context, question, answers or ("x",))


def test_rows(vocabulary):
    assert vocabulary.special == {0, 1} and len(vocabulary.stop) == 4
    row = data.encode(squad("ab", "Wer?", "Ülm", "other"), vocabulary, 1000)
    assert row.ids.count(0) == 1 and row.ids[0] == 0
    assert vocabulary.decode(row.ids) == "ab\nQuestion: Wer?\nAnswer: Ülm\n"
    assert vocabulary.decode(row.ids[row.start:]).endswith(" Ülm\n")
    assert row.ids == vocabulary.encode("ab\nQuestion: Wer?\nAnswer: Ülm\n")  # whole, not in pieces
    unanswerable = data.encode(data.Example("0", "squad", "ab", "q", ()), vocabulary, 1000)
    assert vocabulary.decode(unanswerable.ids[unanswerable.start:]) == " \n"


def test_bos_is_the_tokenizers_own(vocabulary, tmp_path):
    """As AutoTokenizer has it, whatever config.json says, but for an EOS behind the text."""
    from transformers import PreTrainedTokenizerFast

    added = {"in front": ("<bos> $A", [0], []), "none": ("$A", [], []),
             "EOS too": ("<bos> $A <eos>", [0], [1]), "EOS alone": ("$A <eos>", [], [1])}
    for template, front, behind in added.values():
        vocabulary.tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<bos>", 0), ("<eos>", 1)])
        vocabulary.tokenizer.save(str(tmp_path / "tokenizer.json"))
        own = data.Vocabulary(tmp_path)
        peer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        assert own.bos == (0 if front else None)
        for text in ("ab", "", " a\nb", "a<bos>b"):
            ids = own.encode(text)
            assert ids + behind == peer(text).input_ids
            assert own.encode_batch(["c", text])[1] == ids
            assert own.encode_plain(text) == ids[len(front):]
            # a text that begins with BOS gets no second one
            assert own.encode("<bos>" + text) == [0, *ids[len(front):]]
            assert data.Vocabulary(tmp_path, bos=0).encode(text) == [0, *ids[len(front):]]
        assert own.encode_at("ab", 0) == (own.encode("ab"), len(front))
        assert own.encode_at("ab", 1) == (own.encode("ab"), len(front) + 1)
        assert own.encode_at("ab", 2) == (own.encode("ab"), len(front) + 2)
        first = len([0, *own.encode_plain("")])
        assert own.encode_at("<bos>ab", 5) == ([0, *own.encode_plain("ab")], first)

    vocabulary.tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <eos> $A", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    vocabulary.tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(data.DataError, match=r"tokens \[0, 1\] in front of a text"):
        data.Vocabulary(tmp_path)


def test_a_context_without_tokens_that_does_not_fit(vocabulary):
    vocabulary.tokenizer.normalizer = normalizers.Strip()
    assert data.encode(squad("    ", "a long question", "x"), vocabulary, 20) is None


def test_only_tokens_that_exist_are_ordinary(vocabulary, tmp_path):
    """No hole between ids and no reserved place."""
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    last = max(ids.values())
    ids[max(ids, key=ids.get)] = last + 9
    names = ["<|reserved_3|>", "[unused7]", "<extra_id_4>", "<SPECIAL_12>", "[control_8]", "<pad>",
             "<special>", "reserved"]
    ids.update({name: last + 10 + i for i, name in enumerate(names)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert data.Vocabulary(tmp_path).ordinary == [*range(2, last), last + 9, last + 16, last + 17]


def test_tokens_beyond_the_embeddings_matter_only_in_a_text_that_has_them(vocabulary, tmp_path):
    N = vocabulary.size
    vocabulary.tokenizer.add_special_tokens(["[PAD]"])
    vocabulary.tokenizer.add_tokens(["<image>"])
    vocabulary.tokenizer.save(str(tmp_path / "tokenizer.json"))
    whole, cut = data.Vocabulary(tmp_path), data.Vocabulary(tmp_path, embedded=N)
    assert whole.ordinary == [*range(2, N), N + 1] and not whole.unembedded
    assert cut.ordinary == [*range(2, N)] and cut.unembedded == {N: "[PAD]", N + 1: "<image>"}
    assert cut.encode("ab") == whole.encode("ab")
    for refused in (cut.encode, cut.encode_plain, lambda text: cut.encode_batch(["a", text])):
        with pytest.raises(data.DataError, match="the token '<image>', number"):
            refused("a<image>b")
    with pytest.raises(data.DataError, match="the two are not of one model"):
        data.Vocabulary(tmp_path, embedded=N - 1)


def test_a_bos_of_another_vocabulary(vocabulary, tmp_path):
    """What the message says to write makes the file load."""
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    special = tokenizer["post_processor"]["special_tokens"]["<bos>"]
    special["ids"] = [128000]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(data.DataError, match="puts token 128000 in front of every text"):
        data.Vocabulary(tmp_path)
    special["ids"] = [next(t["id"] for t in tokenizer["added_tokens"] if t["content"] == "<bos>")]
    path.write_text(json.dumps(tokenizer))
    assert data.Vocabulary(tmp_path).encode("a") == vocabulary.encode("a")


def test_two_tokens_in_front_of_every_text(vocabulary, tmp_path):
    """What the message says to take out makes the file load."""
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = tokenizer["post_processor"]["single"]
    added.insert(0, added[0])
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(data.DataError, match=r"puts tokens \[0, 0\] .*: take the other"):
        data.Vocabulary(tmp_path)
    del added[0]
    path.write_text(json.dumps(tokenizer))
    assert data.Vocabulary(tmp_path).encode("a") == vocabulary.encode("a")


def test_the_letter_that_byte_level_tokenizers_write_for_a_line_break(tmp_path):
    """In a sentencepiece vocabulary it is a letter, and an answer goes on after it."""
    pieces = ["<unk>", "<0x0A>", "Ċ", "\n\n", "a"]
    t = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>",
                             byte_fallback=True))
    t.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    t.save(str(tmp_path / "tokenizer.json"))
    assert data.Vocabulary(tmp_path, (4,)).stop == {1, 3, 4}


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(data.DataError, match="no such file: a model folder needs its tokenizer"):
        data.Vocabulary(tmp_path)


def test_an_empty_text_without_bos_is_no_row(vocabulary, tmp_path):
    vocabulary.tokenizer.post_processor = processors.ByteLevel()
    vocabulary.tokenizer.save(str(tmp_path / "tokenizer.json"))
    empty = data.Example("0", "text", "", "", ())
    assert data.encode(empty, data.Vocabulary(tmp_path), 10) is None
    assert data.encode(empty, vocabulary, 10).ids == [0]


def test_a_text_prompt_is_the_beginning_of_the_text(vocabulary):
    example = squad("ab ab ab ab", "Wer?", "x")
    plain = data.encode(example, vocabulary, 1000)
    row = data.encode(example, vocabulary, 1000, "say:\n")
    assert vocabulary.decode(row.ids) == "say:\nab ab ab ab\nQuestion: Wer?\nAnswer: x\n"
    assert row.ids == vocabulary.encode("say:\nab ab ab ab\nQuestion: Wer?\nAnswer: x\n")
    more = len(row.ids) - len(plain.ids)
    assert (row.start, row.body) == (plain.start + more, plain.body + more) and not row.cut
    # the context is cut as it is without the text prompt, which is never cut
    shorter = data.encode(example, vocabulary, len(plain.ids) - 3)
    cut = data.encode(example, vocabulary, len(plain.ids) - 3, "say:\n")
    assert cut.cut == shorter.cut == 3
    assert vocabulary.decode(cut.ids) == "say:\n" + vocabulary.decode(shorter.ids)


def test_lengths_that_are_known_without_the_context(vocabulary):
    """What fits is known as encode finds out, and the number of answer tokens."""
    examples = [squad("ab " * 50, "W" * k, "c" * (k % 7)) for k in range(30)]
    examples.append(squad("c", "q" * data.LONGEST_TOKENISED))
    for longest in (20, 30, 40, 200):
        rows = [data.encode(e, vocabulary, longest) for e in examples]
        sizes = list(data.sizes(examples, vocabulary))
        assert [tokens <= longest for tokens, _ in sizes] == [row is not None for row in rows]
        for row, (_, answer), example in zip(rows, sizes, examples):
            assert row is None or answer == len(row.ids) - row.start
            assert row is not None or not data.surely_fits(example, vocabulary, longest)
    assert any(data.surely_fits(e, vocabulary, 200) for e in examples)


def test_what_is_asked_does_not_depend_on_the_answer(vocabulary):
    """Llama 3 has a token for a colon and a line break: an empty answer must not merge with
    the cue before it."""
    rows = [data.encode(e, vocabulary, 1000)
            for e in (squad("c", "q", "x"), data.Example("0", "squad", "c", "q", ()))]
    assert rows[0].question == rows[1].question == vocabulary.encode("c\nQuestion: q\nAnswer:")
    assert all(r.ids[:r.start] == r.question for r in rows)
    # an answer may still merge; it is asked the same
    merged = data.encode(squad("c", "q", "\n"), vocabulary, 1000)
    assert data.collate([merged]).asked[0][-1] == rows[0].question[-1]


@pytest.mark.parametrize("length", [60, 45, 41, 40])
def test_only_the_context_is_cut(vocabulary, length):
    context = "one two three four five six"
    full = data.encode(squad(context, "Why?", "six"), vocabulary, 1000)
    row = data.encode(squad(context, "Why?", "six"), vocabulary, length)
    text = vocabulary.decode(row.ids)
    assert len(row.ids) <= length and text.endswith("Question: Why?\nAnswer: six\n")
    kept = text.removesuffix("Question: Why?\nAnswer: six\n").rstrip("\n")
    assert context.startswith(kept) and (row.cut > 0) == (kept != context)
    assert len(full.ids) > 41


@pytest.mark.parametrize("context", ["😀" * 9, "a\u200b " * 9, "  \n" * 9, "x" * 30 + "\U0001f600"])
def test_cutting_ends_on_characters_of_many_tokens(vocabulary, context):
    """Tokens of one character share their offsets, and those of spaces may be empty: cutting
    must still go on."""
    for length in range(32, 48):
        row = data.encode(squad(context, "Why?", "six"), vocabulary, length)
        assert row is None or len(row.ids) <= length and vocabulary.decode(
            row.ids).endswith("Answer: six\n")


def test_a_text_is_a_row_without_an_answer(vocabulary):
    row = data.encode(data.Example("0", "text", "some text", "", ()), vocabulary, 6)
    assert row.ids == vocabulary.encode("some text")[:6] and row.start == 6 and row.cut == 4


def test_a_question_too_long_by_itself(vocabulary):
    assert data.encode(squad("context", "q" * 50), vocabulary, 40) is None


# --------------------------------------------------------------------------------------------------
# batches


def test_order_is_a_pure_function_that_visits_all():
    contexts = [f"c{i // 4}" for i in range(22)]
    order = data.Order(contexts, 8, seed=3)
    indices = [i for step in range(11) for i in order[step]]
    assert all(sorted(indices[22 * e: 22 * e + 22]) == list(range(22)) for e in range(4))
    assert indices[:22] != indices[22:44]
    # steps may be asked for in any sequence
    other = data.Order(contexts, 8, seed=3)
    assert [other[step] for step in (9, 2, 5)] == [order[step] for step in (9, 2, 5)]
    assert data.Order(contexts, 8, seed=4)[0] != order[0]

    def changes_of_context(order):
        return sum(contexts[a] != contexts[b] for a, b in itertools.pairwise(order.epoch(0)))

    assert changes_of_context(order) == 5
    assert changes_of_context(data.Order(contexts, 8, seed=3, share=False)) > 8


def random_rows(g, shapes):
    """shapes: (context length, question length, answer length) of rows; equal context
    lengths share a context."""
    contexts = {c: [0] + [g.randrange(2, 97) for _ in range(c)] for c, _, _ in shapes}
    rows = []
    for c, q, a in shapes:
        ids = contexts[c] + [g.randrange(2, 97) for _ in range(q + a)]
        rows.append(data.Row(ids, 1 + c + q, ids[:1 + c + q], str(c), 0))
    return rows


MANY = [(c, 3 + q % 4, 1 + q % 3) for c in (150, 140, 130) for q in range(5)]
SHAPES = {"many": MANY,
          "ragged": [(9, 3, 2), (9, 5, 4), (4, 2, 1), (9, 1, 6), (4, 7, 3), (13, 2, 2)],
          "one question": [(8, 3, 2)], "no context": [(0, 3, 2), (0, 5, 1), (0, 2, 4)],
          "each its own": [(3, 2, 2), (5, 4, 1), (7, 1, 3)], "same twice": [(6, 1, 1), (6, 1, 1)]}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cut", [True, False])
def test_trie_equals_plain(hf, name, cut):
    """Loss, gradient and generated tokens of the trie are those of every example alone."""
    model = llama.load(hf()[1], torch.float64)
    rows = random_rows(random.Random(5), SHAPES[name])
    layers = {i: torch.randn(4, 48, generator=torch.Generator().manual_seed(i)).double()
              .requires_grad_() for i in (0, 3)}
    prompt = llama.Prompt(layers, cut)

    def loss_and_gradient(batch):
        past = model.extend(batch.shared, prompt.past(model))
        loss, count = answer_loss(model, past, batch)
        return loss.item(), count, torch.autograd.grad(loss, list(layers.values()))

    # the plain way: whole rows, all logits, labels shifted by hand
    expected_loss, gradients = 0.0, []
    for row in rows:
        ids = torch.tensor([row.ids])
        h, _ = model(ids[:, :-1], prompt.past(model))
        losses = torch.nn.functional.cross_entropy(model.logits(h)[0], ids[0, 1:], reduction="none")
        answer = losses[row.start - 1:].sum()
        expected_loss += answer.item()
        gradients.append(torch.autograd.grad(answer, list(layers.values())))
    expected_gradient = [sum(g) for g in zip(*gradients)]

    trie = data.collate(rows)
    assert len(trie.shared) == len({r.context for r in rows})
    for batch in (trie, data.collate(rows, share=False)):
        loss, count, gradient = loss_and_gradient(batch)
        assert count == sum(len(r.ids) - r.start for r in rows)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        torch.testing.assert_close(list(gradient), expected_gradient, rtol=1e-10, atol=1e-11)

    past = model.extend(trie.shared, prompt.past(model))
    alone = [llama.generate(model, [row.ids[:row.start]], prompt.past(model), 5)[0] for row in rows]
    assert llama.generate(model, trie.asked, past.take(trie.parent), 5) == alone
    assert llama.generate(model, trie.asked, past, 5, parent=trie.parent) == alone


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("suffix", [False, True])
def test_a_batch_holds_its_rows(vocabulary, share, suffix):
    """Beginning, head and tail are the row's tokens, and the labels its answer."""
    questions = {"Wer?": "x", "Wer ist?": "\n", "q": "Ülm", "q?": "a longer one", "?": ""}
    examples = [squad(context, question, answer) for context in ("one two", "", "three")
                for question, answer in questions.items()]
    rows = [data.encode(e, vocabulary, 1000) for e in examples]
    # of this one the answer has changed the question's last token, 7
    merged = data.Row([0, 5, 6, 9, 10, 11], 3, [0, 5, 6, 7], "merged", 0)
    rows.append(merged)

    batch = data.collate(rows, share, suffix)
    assert len(batch.shared) == (4 if share else len(rows))
    assert batch.tails.dtype == batch.labels.dtype == batch.parent.dtype == torch.int64
    for i, row in enumerate(rows):
        beginning = real(batch.shared[batch.parent[i]])
        head = real(batch.head[i]) if suffix else []
        tail, labels = real(batch.tails[i]), batch.labels[i].tolist()
        assert beginning + head + tail + row.ids[-1:] == row.ids
        scored = [label for label in labels if label != data.NO_LABEL]
        assert scored == row.ids[row.start:]
        assert scored[:-1] == tail[len(tail) - len(scored) + 1:]  # each label is the next token
        assert beginning + head + batch.asked[i] == row.question
        if suffix:
            assert head and len(batch.asked[i]) == (2 if row is merged else 1)


def real(ids):
    return [i for i in ids.tolist() if i != data.PAD]


def test_the_first_answer_token_is_predicted_from_the_token_before_it():
    row = data.Row([0, 11, 12, 13, 21, 22], 4, [0, 11, 12, 13], "c", 0)  # 21 22 is the answer
    batch = data.collate([row])
    assert batch.shared.tolist() == [[0, 11, 12]] and batch.tails.tolist() == [[13, 21]]
    assert batch.labels.tolist() == [[21, 22]]
    assert batch.asked == [[13]]
    two = data.collate([row, data.Row([0, 11, 14, 21], 3, [0, 11, 14], "c", 0)])
    assert two.shared.tolist() == [[0, 11]] and two.labels.tolist() == [
        [-100, 21, 22], [21, -100, -100]]


# --------------------------------------------------------------------------------------------------
# scores


@pytest.mark.parametrize("prediction, golds, em, f1", [
    ("The  Cat!", ["cat"], 1, 1), ("a cat, the dog", ["cat"], 0, 2 / 3), ("dog", ["cat"], 0, 0),
    ("cat cat", ["cat"], 0, 2 / 3), ("an", ["the"], 1, 1), ("", [], 1, 1), ("cat", [], 0, 0),
    ("", ["cat"], 0, 0), ("big red", ["red", "big red car"], 0, 0.8), ("U.S.A.", ["USA"], 1, 1),
    ("“cat”", ["cat"], 0, 0), ("theatre", ["a theatre"], 1, 1), (None, ["cat"], 0, 0),
    (None, [], 0, 0), ("x", ["the", "x"], 1, 1)])
def test_squad_scores(prediction, golds, em, f1):
    """Worked by hand from the rules of evaluate-v2.0.py."""
    scores = data.score(data.Example("0", "squad", "c", "q", tuple(golds)), prediction)
    assert (scores["exact_match"], scores["f1"]) == (em, pytest.approx(f1))


def official_words(text):
    """The normalisation of evaluate-v2.0.py, written without its regular expression: an article is
    a maximal run of letters and digits once the punctuation is gone."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    runs = ["".join(run) for _, run in itertools.groupby(text, str.isalnum)]
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def official_scores(prediction, golds):
    """Exact match and F1 as evaluate-v2.0.py defines them."""
    golds = [official_words(gold) for gold in golds]
    golds = [gold for gold in golds if gold] or [[]]
    words = official_words(prediction)
    exact, f1 = [], []
    for gold in golds:
        exact.append(int(gold == words))
        rest = list(gold)
        for word in words:
            if word in rest:
                rest.remove(word)
        common = len(gold) - len(rest)
        if not gold or not words:
            f1.append(int(gold == words))
        elif common == 0:
            f1.append(0)
        else:
            precision, recall = common / len(words), common / len(gold)
            f1.append(2 * precision * recall / (precision + recall))
    return max(exact), max(f1)


def test_squad_scores_are_the_official_scripts():
    pieces = ["a", "an", "the", "The", "cat", "Cat's", "dog", "dog.", "a-", "thé", "the_", "U.S.",
              "“the”", "3.5", "Ülm", "İ", "ß", "SS", "x/a", "\u00a0", "\t", ",", "'", "—a—", "²", "an's"]
    r = random.Random(0)

    def text():
        return r.choice(["", " ", "  "]).join(r.choices(pieces, k=r.randrange(5)))

    outcomes = set()
    for _ in range(3000):
        golds = tuple(text() for _ in range(r.randrange(4)))
        prediction = r.choice([text(), *golds])
        scores = data.score(data.Example("0", "squad", "c", "q", golds), prediction)
        expected = official_scores(prediction, golds)
        assert (scores["exact_match"], scores["f1"]) == pytest.approx(expected), (prediction, golds)
        outcomes.add((scores["exact_match"], 0 < scores["f1"] < 1))
    assert outcomes == {(0, False), (0, True), (1, False)}  # wrong, partly right, right


def test_precision_and_recall():
    scores = data.score(squad("c", "q", "red cat", "blue"), "red dog car")
    assert scores["precision"] == pytest.approx(1 / 3) and scores["recall"] == pytest.approx(1 / 2)
    # they are of the gold with the best F1, here the second
    scores = data.score(squad("c", "q", "red", "red big dog"), "red big cat")
    assert scores["precision"] == scores["recall"] == pytest.approx(2 / 3)
    assert data.mean_scores([{"f1": 0.0}, {"f1": 0.5}]) == {"f1": 25.0}


@pytest.mark.parametrize("question, prediction, gold, exact, same", [
    ("1 + 1", "2", "2", 1, 1), ("1 + 1", " 2 ", "2", 1, 1), ("q", "0.50", "1/2", 0, 1),
    ("q", "2/4", "1/2", 0, 1), ("q", "-3.0", "-3", 0, 1), ("q", "3", "-3", 0, 0),
    ("q", "1/0", "1/0", 1, 1), ("q", "1/0", "2/0", 0, 0), ("q", "6*sqrt(2)", "6*sqrt(2)", 1, 1),
    ("q", "sqrt(4)", "2", 0, 0), ("q", "", "0", 0, 0), ("q", "1e3", "1000", 0, 0),
    ("In base 14, what is 1 + 1?", "98.0", "98", 0, 0),
    ("In base 14, what is 1 + 1?", "98", "98", 1, 1), ("q", r"\frac{1}{2}", "0.5", 0, 1),
    ("q", "1 2", "12", 0, 0), ("q", r"3\frac{1}{2}", "7/2", 0, 0), ("q", "٣", "3", 0, 0)])
def test_value_scores(question, prediction, gold, exact, same):
    scores = data.score(data.Example("0", "math", "", question, (gold,)), prediction)
    assert scores == {"accuracy": exact, "accuracy_value": same}
