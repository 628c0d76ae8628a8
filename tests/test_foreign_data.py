"""What a file that is no data is: doing what the line says makes a file that is read."""

import bz2
import contextlib
import gzip
import json
import lzma
import pickle
import shutil
import sqlite3
import subprocess
import tarfile
import zipfile

import pytest

import data
import promptprior
from lab import evaluation
from lab.console import UserError
from lab.foreign_data import check_data
from lab.inputs import parse_spec
from test_data import FLAT, obey, write


@pytest.mark.parametrize("start, message", [
    (b"PAR1\x15\x04", "a Parquet file: .*read_parquet"), (b"ARROW1\0\0", "an Arrow file"),
    (b"\xff\xff\xff\xff\x10", "an Arrow stream"), (b"PK\3\4rest", "a zip archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel table: .*read_excel"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file: .*read_hdf"),
    (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive .*: unpack it by `python -m py7zr x "),
    (b"\x1f\x8b\x08rest", "packed by gzip"), (b"\n <!DOCTYPE html>", "a web page"),
    (b"<HTML lang=x>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1", "git lfs pull")])
@pytest.mark.parametrize("kind", ["squad", "math", "text"])
def test_files_of_other_kinds_are_named(tmp_path, kind, start, message):
    """Of text what is in a .gz, too."""
    path = write(tmp_path / "x.json", start + b" " * 50)
    with pytest.raises(UserError, match=message) as e:
        parse_spec(f"{kind}:{path}", 0)
    assert str(e.value).startswith((f"{path}: a ", f"{path}: an ")) or "packed by gzip" in message
    assert "\n" not in str(e.value)
    packed = write(tmp_path / "x.json.gz", gzip.compress(start + b" " * 50))
    with pytest.raises(UserError, match=message if kind == "text" else "packed by gzip"):
        parse_spec(f"{kind}:{packed}", 0)


def test_texts_that_begin_like_other_kinds(tmp_path):
    for text in ("BZh, they said.", "Pk", "par1", "7z is a program.", "SQLite format", "htmlx",
                 "x" * 257 + "Ustar", "<htm>"):
        spec = "text:" + write(tmp_path / "x.txt", text)
        assert data.read(*parse_spec(spec, 0))[0].context == text


QUESTION = {**FLAT[0], "answers": ["a cat", "cat"]}
LINE = json.dumps(QUESTION) + "\n"
PRINTED = {**QUESTION, "answers": "['a cat', 'cat']"}  # for tables whose cells hold no lists


def in_archive(path):
    (path.parent / "in.jsonl").write_text(LINE)
    if path.suffix == ".7z":
        import py7zr

        with py7zr.SevenZipFile(path, "w") as file:
            file.write(path.parent / "in.jsonl", "folder/x.JSONL")
    elif "zip" in path.name:
        with zipfile.ZipFile(path, "w") as file:
            file.write(path.parent / "in.jsonl", "folder/x.JSONL")
    else:
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
            file.add(path.parent / "in.jsonl", "folder/x.JSONL")
    (path.parent / "in.jsonl").unlink()


def frame(path, method, question=QUESTION, **options):
    import pandas

    getattr(pandas.DataFrame([question]), method)(path, **options)


def in_database(path):
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.execute("create table counted (id integer primary key autoincrement)")
        file.execute("drop table counted")
        frame("my questions", "to_sql", PRINTED, con=file, index=False)


def in_old_excel(path):
    import xlwt

    book = xlwt.Workbook()
    sheet = book.add_sheet("questions")
    for column, (name, content) in enumerate(PRINTED.items()):
        sheet.write(0, column, name)
        sheet.write(1, column, content)
    book.save(str(path))


def in_array(path):
    import numpy

    fields = [(key, "U99") for key in ("id", "context", "question", "answers")]
    numpy.save(path, numpy.array([tuple(PRINTED[key] for key, _ in fields)], dtype=fields))


# A file's name -> the modules that it needs, and what writes the question into it
OTHER_KINDS = {
    "x.json.gz": ([], lambda p: p.write_bytes(gzip.compress(LINE.encode()))),
    "x.json.xz": ([], lambda p: p.write_bytes(lzma.compress(LINE.encode()))),
    "x.json.bz2": ([], lambda p: p.write_bytes(bz2.compress(LINE.encode()))),
    "x.json.zst": ([], lambda p: subprocess.run(["zstd", "-q", "-o", p], input=LINE.encode())),
    "packed.json": ([], lambda p: p.write_bytes(gzip.compress(LINE.encode()))),
    "x.zip": ([], in_archive), "x.tar": ([], in_archive), "x.tar.gz": ([], in_archive),
    "x.7z": (["py7zr"], in_archive), "x.xls": (["pandas", "xlrd", "xlwt"], in_old_excel),
    "x.parquet": (["pandas", "pyarrow"], lambda p: frame(p, "to_parquet")),
    "x.feather": (["pandas", "pyarrow"], lambda p: frame(p, "to_feather")),
    "x.xlsx": (["pandas", "openpyxl"], lambda p: frame(p, "to_excel", PRINTED, index=False)),
    "x.db": (["pandas"], in_database), "x.pkl": (["pandas"], lambda p: frame(p, "to_pickle")),
    "list.pkl": (["pandas"], lambda p: p.write_bytes(pickle.dumps([QUESTION]))),
    "x.npy": (["pandas"], in_array),
    "x.h5": (["pandas", "tables"], lambda p: frame(p, "to_hdf", key="x"))}


@pytest.mark.parametrize("name", OTHER_KINDS)
@pytest.mark.filterwarnings("ignore")  # HDF5 has no lists, so pandas pickles them, and warns
def test_what_is_said_of_other_kinds_helps(tmp_path, name):
    """Also of such a file in a folder, where no other is."""
    modules, make = OTHER_KINDS[name]
    for module in modules:
        pytest.importorskip(module)
    if name.endswith(".zst") and not shutil.which("zstd"):
        pytest.skip("no zstd here")
    folder = tmp_path / "it's mine"
    folder.mkdir()
    make(folder / name)
    for _ in range(3):
        with pytest.raises(UserError) as e:
            check_data("squad", str(folder / name))
        with pytest.raises(UserError) as other:
            check_data("squad", str(folder))
        assert str(other.value) == str(e.value) or (folder / "packed.json").exists()
        name = obey(e, tmp_path)
        if not name.endswith(".tar"):
            break
    assert [e._replace(id="", source="") for e in data.read("squad", name)] == [
        data.Example("", "squad", FLAT[0]["context"], "Who?", ("a cat", "cat"))]


def test_numbers_in_excel_are_answers(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("openpyxl")
    table = {"context": ["c", "c"], "question": ["q", "q"], "answers": [42, None]}
    pandas.DataFrame(table).to_excel(tmp_path / "x.xlsx", index=False)
    with pytest.raises(UserError) as e:
        check_data("squad", str(tmp_path / "x.xlsx"))
    assert [x.answers for x in data.read("squad", obey(e, tmp_path))] == [("42",), ()]


def test_a_folder_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(FLAT)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="Arrow files, in test, train") as e:
        check_data("squad", str(tmp_path / "two"))
    assert obey(e, tmp_path) == str(tmp_path / "two/train.jsonl")
    for path in ("one", "two/train", "one/data-00000-of-00001.arrow"):
        with pytest.raises(UserError, match="an Arrow stream|in (one|train), ") as e:
            check_data("squad", str(tmp_path / path))
        assert [x.answers for x in data.read("squad", obey(e, tmp_path))] == [("a cat", "cat"), ()]


def test_a_folder_of_arrow_files_needs_no_state(tmp_path):
    write(tmp_path / "x-train.arrow", b"\xff\xff\xff\xff")
    write(tmp_path / "dataset_info.json", "{}")
    with pytest.raises(UserError, match="Dataset.from_file.*x-train.arrow"):
        check_data("squad", str(tmp_path))
    write(tmp_path / "state.json", "{}")
    with pytest.raises(UserError, match="load_from_disk"):
        check_data("squad", str(tmp_path))


def test_what_cannot_be_opened_is_left_to_the_reader(tmp_path):
    """Also a .gz that is none, or that is cut."""
    for content in (b"plain", gzip.compress(b"x" * 5000)[:20], b"", b"\x1f\x8b"):
        check_data("text", write(tmp_path / "x.txt.gz", content))
        with pytest.raises(data.DataError):
            data.read("text", str(tmp_path / "x.txt.gz"))
    (tmp_path / "x.txt.gz").unlink()
    with pytest.raises(data.DataError, match="nothing found"):
        check_data("squad", str(tmp_path))


PAGE = "<!DOCTYPE html>\n<p>Not found</p>\n"  # might be a sum, and its answer


@pytest.mark.parametrize("arguments", [
    ["train", "--data", "math:PAGE"], ["train", "--eval-data", "math:PAGE"],
    ["train", "--text-file", "PAGE"], ["train", "--config", "PAGE"],
    ["sample", "--reference", "text:PAGE"], ["collect", "--data", "text:PAGE"],
    ["import", "FOLDER"], ["figures", "--math-data", "math:PAGE"]], ids=" ".join)
def test_a_command_reads_no_web_page(tmp_path, capsys, arguments):
    """Nor does it make anything."""
    page, folder = tmp_path / "page.txt", tmp_path / "out"
    if "FOLDER" in arguments:
        page = tmp_path / "adapter_config.json"
    page.write_text(PAGE)
    words = [a.replace("PAGE", str(page)).replace("FOLDER", str(tmp_path)) for a in arguments]
    assert promptprior.main([*words, "--out", str(folder)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"promptprior: error: {page}: a web page, not the file: fetch it by the page's download "
        "link")
    assert not folder.exists()
    assert len(data.read("math", write(tmp_path / "y.txt", PAGE))) == 1  # would be read


def test_nor_is_one_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "open_run", lambda *_: None)
    page = write(tmp_path / "page.jsonl", PAGE)
    with pytest.raises(UserError, match="page.jsonl: a web page"):
        evaluation.command_generate({"paths": ["x"], "batch": page})
