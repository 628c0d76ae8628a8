"""What a file is that data.py cannot read, and the command that turns it into one that it can.

data.py reads texts, and of another file it says that this is none. Here such a file is recognised
by its first bytes before it is read, because a web page is a text, too.

    check_data("squad", path)                             # a file, a folder or a glob
    config = data.read_json(not_foreign(path), dict)
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shlex
import zlib
from pathlib import Path
from typing import Callable

import data
from lab.console import UserError

# --------------------------------------------------------------------------------------------------
# kinds of files, and what helps


def _export(modules: str, table: str, path: Path, ending: str = ".jsonl") -> str:
    """The remedy for a table that Python libraries read. table: the code that makes it of the path
    p. ending: .csv where lists were written as texts, or numbers may be answers."""
    write = {".jsonl": "to_json(p + '.jsonl', orient='records', lines=True)",
             ".csv": "to_csv(p + '.csv', index=False)"}[ending]
    return (f"convert it by `python -c \"import sys, {modules}; p = sys.argv[1]; {table}.{write}\" "
            f"{shlex.quote(str(path))}` and give {path}{ending}")


def _pandas(what: str, table: str, ending: str = ".jsonl") -> Callable[[Path], str]:
    return lambda path: f"{what}: " + _export("pandas", f"pandas.{table}", path, ending)


def _archive(what: str, command: str) -> Callable[[Path], str]:
    """command: what unpacks PATH into the folder DIR."""
    def explain(path: Path) -> str:
        target = path.with_name(f"{path.stem}-unpacked")
        words = {"PATH": shlex.quote(str(path)), "DIR": shlex.quote(str(target))}
        filled = re.sub("PATH|DIR", lambda m: words[m[0]], command)
        return f"{what}: unpack it by `{filled}` and give {target}"

    return explain


def _packed(what: str, command: str) -> Callable[[Path], str]:
    """command: what unpacks its standard input."""
    def explain(path: Path) -> str:
        is_named = path.suffix.lower() in (".gz", ".xz", ".zst", ".bz2")
        target = path.with_suffix("") if is_named else path.with_name(f"unpacked-{path.name}")
        return (f"packed by {what}: unpack it by `{command} < {shlex.quote(str(path))} > "
                f"{shlex.quote(str(target))}` and give {target}")

    return explain


def _zip(path: Path) -> str:
    """An Excel table is a zip of files, whose names stand at its end."""
    with open(path, "rb") as file:
        file.seek(-min(path.stat().st_size, 2**16), os.SEEK_END)
        is_table = b"xl/workbook.xml" in file.read()
    return _excel(path) if is_table else _unzip(path)


_excel = _pandas("an Excel table", "read_excel(p, dtype=str)", ".csv")
_unzip = _archive("a zip archive", "python -m zipfile -e PATH DIR")
_tar = _archive("a tar archive", "python -m tarfile -e PATH DIR")
TRUST = "which can run any program, so only if you trust its maker"

# How a file begins, as a regular expression -> what it is, and what helps. First the texts that may
# be in the place of any file.
STAND_INS: dict[bytes, Callable[[Path], str]] = {
    rb"version https://git-lfs": lambda path: "a git-lfs pointer, not the file: run `git lfs "
                                              "pull` in its folder",
    rb"(?i)\s*<(!doctype )?html": lambda path: "a web page, not the file: fetch it by the page's "
                                               "download link",
}
KINDS: dict[bytes, Callable[[Path], str]] = STAND_INS | {
    rb"PAR1": _pandas("a Parquet file", "read_parquet(p)"),
    rb"ARROW1": _pandas("an Arrow file", "read_feather(p)"),
    rb"\xff{4}": lambda path: "an Arrow stream: " + _export(
        "datasets", "datasets.Dataset.from_file(p)", path),
    rb"PK\x03\x04": _zip,
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": _excel,
    rb"SQLite format 3\0": lambda path: "an SQLite database, of whose first table: " + _export(
        "sqlite3, pandas", "d = sqlite3.connect(p); t, = d.execute('select name from sqlite_master "
        "where type = ? and name not like ?', ('table', 'sqlite%')).fetchone(); "
        "pandas.read_sql(f'select * from [{t}]', d)", path, ".csv"),
    rb"\x89HDF\r\n\x1a\n": _pandas("an HDF5 file", "read_hdf(p)"),
    rb"\x80[\x02-\x05]": _pandas(f"a pickle, {TRUST}", "DataFrame(pandas.read_pickle(p))"),
    rb"\x93NUMPY": lambda path: "a numpy array: if its fields have names and are no objects, "
                                 + _export("numpy, pandas", "pandas.DataFrame(numpy.load(p))",
                                           path, ".csv"),
    rb"(?s).{257}ustar": _tar,
    rb"7z\xbc\xaf\x27\x1c": _archive("a 7z archive (pip install py7zr)",
                                      "python -m py7zr x PATH DIR"),
    rb"\x1f\x8b": _packed("gzip", "gzip -d"),
    rb"\xfd7zXZ\0": _packed("xz", "xz -d"),
    rb"\x28\xb5\x2f\xfd": _packed("zstd", "zstd -d"),
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": _packed("bzip2", "bzip2 -d"),
}


# --------------------------------------------------------------------------------------------------
# checks


def not_foreign(path: str | Path, kinds: dict[bytes, Callable[[Path], str]] = KINDS,
            open_file: Callable = open) -> str | Path:
    """path itself. Raises UserError if a file of one of the kinds is there. Of one that cannot be
    opened its reader says why."""
    file, explanation = Path(path), None
    with contextlib.suppress(OSError, EOFError, zlib.error):
        if file.is_file():  # opening a pipe would wait for a writer
            with open_file(file, "rb") as content:
                start = content.read(300)
            explanation = next((explain(file) for signature, explain in kinds.items()
                                if re.match(signature, start)), None)
    if explanation:
        raise UserError(f"{path}: {explanation}")
    return path


def check_data(kind: str, path: str) -> None:
    """Raise UserError if a file that data.read would read is of one of the kinds, or if a folder
    has only such; DataError if nothing is there."""
    below: list[Path] = []
    with contextlib.suppress(OSError):  # files_of says it
        below = data.files_below(Path(path)) if Path(path).is_dir() else []
    arrow_files = [file for file in below if file.suffix == ".arrow"]
    if arrow_files:
        raise UserError(f"{path}: {_arrow(arrow_files)}")
    try:
        files = data.files_of(kind, path)
    except data.DataError:
        for file in below[:1000]:  # a file of another kind has another ending
            not_foreign(file)
        raise
    for file in files:
        is_read_packed = kind == "text" and file.suffix.lower() == ".gz"
        not_foreign(file, open_file=gzip.open if is_read_packed else open)


def _arrow(files: list[Path]) -> str:
    """What helps a folder of Arrow files: datasets' cache, or what its save_to_disk wrote, which
    has a state.json, and a folder of every split."""
    names = ", ".join(sorted({file.parent.name for file in files}))
    file = next((file for file in files if file.parent.name == "train"), files[0])
    remedy = _export("datasets", "datasets.Dataset.from_file(p)", file)
    if (file.parent / "state.json").exists():
        remedy = _export("datasets", "datasets.load_from_disk(p)", file.parent)
    return f"a folder of Arrow files, in {names:.200}, of which one is read at once: {remedy}"
