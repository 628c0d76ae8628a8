"""Damage to files of every kind that the program reads: by rules that know the kind, and by rules
that know of none.

    content = wild(random.Random(0), content, other)      # other: of another whole file
    meaningless = damage(random.Random(0), path, [other_path])
"""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
import os
import pickle
import random
import re
from pathlib import Path
from typing import Callable

import safetensors.torch

from lab import folder


# --------------------------------------------------------------------------------------------------
# damage by kind of file: each takes a generator of random numbers and a content, and gives another

DEEP = "[" * 100_000
RAW = ["NaN", "-Infinity", "1e999", "1" + "0" * 30, "9" * 5000, "-1", "0", "1.5", "2147483648",
       "9223372036854775808", "null", "true", "false", "\"\"", "[]", "{}", "[null]", "[[]]",
       "\"x\"", '"\\u0000"', '"\\ud83d"', '"\\u001b]0;owned\\u0007\\u001b[31mred"', '"\\u202eabc"',
       '"' + "y" * 300_000 + '"', '{"a": 1, "a": 2}', DEEP, "[1, -1, 999999999]", '"../../x"',
       '"/etc/passwd"', '"cuda:99"', '"\\n\\n"', "[\"a\", \"a\"]", "1e-320", "[0.5]"]


class Raw(str):
    """JSON text that stands for a value."""


def to_json(value, **options) -> str:
    raw: list[str] = []

    def hide(x):
        if isinstance(x, Raw):
            raw.append(x)
            return f"<raw {len(raw) - 1}>"
        if isinstance(x, dict):
            return {k: hide(v) for k, v in x.items()}
        return list(map(hide, x)) if isinstance(x, list) else x

    text = json.dumps(hide(value), **options)
    return re.sub(r'"<raw (\d+)>"', lambda m: raw[int(m[1])], text)


def places(value, path: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) \
        if isinstance(value, list) else ()
    return [path] + [p for k, v in inside for p in places(v, (*path, k))]


def damaged_value(r: random.Random, value):
    """A JSON value with a part deleted, doubled, exchanged, renamed or of another type."""
    value = copy.deepcopy(value)
    for _ in range(r.choice([1, 1, 1, 2, 5])):
        # a shallow part as often as one of many deep ones
        found = [p for p in places(value) if p]
        if not found:
            return Raw(r.choice(RAW))
        depth = r.choice(sorted({len(p) for p in found}))
        *way, key = r.choice([p for p in found if len(p) == depth])
        holder = value
        for k in way:
            holder = holder[k]
        old, how = holder[key], r.randrange(8)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.insert(r.randrange(len(holder) + 1), copy.deepcopy(old))
        elif how == 2 and isinstance(holder, dict):
            holder[r.choice([f"{key}x", "", "__class__", "a\x1b[2Jb", *holder])] = holder.pop(key)
        elif how == 3:
            other = r.choice(found)
            there = value
            for k in other:
                there = there[k] if isinstance(there, (list, dict)) and not isinstance(
                    there, Raw) else there
            holder[key] = copy.deepcopy(there)
        elif how == 4 and type(old) in (int, float):
            holder[key] = r.choice([-old, old + 1, old - 1, old * 2, old * 10**6, old / 3, str(old),
                                    [old]])
        elif how == 5 and isinstance(old, str) and not isinstance(old, Raw):
            i = r.randrange(len(old) + 1)
            holder[key] = old[:i] + r.choice(
                ["\0", "\x1b[31m", "\ud800", "\u2028", "\u202e", "", "\n", "\x9b2J", "\U0001f600",
                 "/../", "'", "\\boxed{"]) + old[i + r.randrange(3):]
        else:
            holder[key] = Raw(r.choice(RAW))
    return value


def damaged_json(r: random.Random, content: bytes) -> bytes:
    value = damaged_value(r, json.loads(content))
    return to_json(value, ensure_ascii=True, indent=r.choice([None, 1])).encode()


def damaged_lines(r: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    for _ in range(r.choice([1, 1, 3])):
        i = r.randrange(len(lines))
        how = r.randrange(6)
        if how == 0:
            lines.insert(i, r.choice(lines))
        elif how == 1 and len(lines) > 1:
            del lines[i]
        elif how == 2:
            lines[i] = r.choice(RAW).encode()
        elif lines[i][:1] == b"{":
            try:
                lines[i] = damaged_json(r, lines[i])
            except (ValueError, RecursionError):  # damaged before
                lines[i] = lines[i][:-1]
        else:
            lines[i] = damaged_bytes(r, lines[i])
    return b"\n".join(lines)


def damaged_bytes(r: random.Random, content: bytes) -> bytes:
    b = bytearray(content)
    for _ in range(r.choice([1, 1, 2, 10])):
        i, n = r.randrange(len(b) + 1), r.choice([1, 2, 8, 64, 4096])
        how = r.randrange(7)
        if how == 0 and i < len(b):
            b[i] ^= 1 << r.randrange(8)
        elif how == 1:
            del b[i:]
        elif how == 2:
            del b[i:i + n]
        elif how == 3:
            b[i:i] = b[i:i + n] or b"x"
        elif how == 4:
            b[i:i + n] = bytes(min(n, len(b) - i))
        elif how == 5:
            b[i:i] = r.randbytes(n)
        else:
            b[i:i] = r.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[2J", b"\r\n", b"\r",
                               b"\n\n\n", b'"', b"}", b"[" * 3000, b"\xed\xa0\x80", b"\xc2\x9b"])
    return bytes(b)


def damaged_safetensors(r: random.Random, content: bytes) -> bytes:
    """The header changed and its length set right, or numbers of a tensor that no training has."""
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8:8 + size]), bytearray(content[8 + size:])
    how, tensors = r.randrange(5), [k for k in header if k != "__metadata__"]
    if how == 0:
        start, end = header[r.choice(tensors)]["data_offsets"]
        step = r.choice([1, 2, 4, 8])
        i = start + r.randrange(max((end - start) // step, 1)) * step
        rest[i:i + step] = r.choice([b"\xff", b"\x00", b"\x7f", b"\x80", b"\xc0"]) * (step - 1) \
            + r.choice([b"\x7f", b"\xff", b"\x00"])
        del rest[len(content) - 8 - size:]
    elif how == 1:
        for k in r.sample(tensors, min(len(tensors), r.choice([1, 3]))):
            header[k]["dtype"] = r.choice(["F64", "F32", "F16", "BF16", "F8_E4M3", "F4", "C64",
                                           "I64", "U16", "I8", "U8", "BOOL", "X", "F6_E2M3"])
    elif how == 2 and len(tensors) > 1:
        a, b = r.sample(tensors, 2)
        header[a], header[b] = header[b], header[a]
    elif how == 3 and header.get("__metadata__"):
        about = header["__metadata__"]
        k = r.choice(sorted(about))
        try:
            about[k] = to_json(damaged_value(r, json.loads(about[k])))
        except ValueError:
            about[k] = r.choice(RAW)
    else:
        header = damaged_value(r, header)
    text = to_json(header, separators=(",", ":")).encode()
    if r.randrange(8):
        text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(rest)


def other_content(r: random.Random, content: bytes) -> bytes:
    return r.choice([
        b"", b"\n", b"{}", b"[]", b"null", DEEP.encode(), pickle.dumps({"a": 1}, 2),
        b"PK\x03\x04" + bytes(60), bz2.compress(content), lzma.compress(content),
        b"PK\x03\x04" + bytes(2**17) + b"xl/workbook.xml", b"SQLite format 3\0" + bytes(90),
        b"\x28\xb5\x2f\xfd" + content, bytes(257) + b"ustar" + content, b"\x93NUMPY" + content,
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), b"\x89HDF\r\n\x1a\n" + content,
        b"7z\xbc\xaf\x27\x1c" + content, b"PAR1" + content, b"<!DOCTYPE html><html>" * 40,
        gzip.compress(content),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", bytes(5000),
        content.decode("latin-1").encode("utf-16"), content.decode("latin-1").encode("utf-16-le"),
        content * 3, content[::-1], (2**63).to_bytes(8, "little") + content[8:],
        (2**27).to_bytes(8, "little") + content[8:], b'{"a":' * 50_000, b"\xef\xbb\xbf" + content])


# --------------------------------------------------------------------------------------------------
# damage that knows no kind: each takes two contents, and gives one with a part of the other in it,
# or without

TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|[-+]?[0-9][0-9.eE+-]*|[A-Za-z_][\w.-]*')
NUMBER = re.compile(rb"[-+]?[0-9][0-9.eE+-]*")
NUMBERS = [b"0", b"-0.0", b"-1", b"1e-320", b"1e29", b"1e308", b"-1e308", b"1e400", b"-Infinity",
           b"NaN", b"255", b"65536", b"2147483647", b"4294967296", b"9007199254740993",
           b"9223372036854775807", b"18446744073709551616", b"9" * 400, b"0x10", b"1_000"]
# Of every width the least, the most, and floating point's infinity, NaN, most and least.
PATTERNS = {1: ["00", "7f", "80", "ff"],
            2: ["0000", "ff7f", "0080", "ffff", "807f", "c07f", "7f7f", "007c", "ff7b", "0100"],
            4: ["00000000", "ffffff7f", "00000080", "ffffffff", "0000807f", "0000c07f", "ffff7f7f",
                "01000000"],
            8: ["0000000000000000", "ffffffffffffff7f", "0000000000000080", "ffffffffffffffff",
                "000000000000f07f", "000000000000f87f", "ffffffffffffef7f", "0100000000000000"]}


def flipped(r: random.Random, b: bytes, other: bytes) -> bytes:
    changed = bytearray(b)
    for _ in range(r.choice([1, 1, 8, 200]) if b else 0):
        changed[r.randrange(len(b))] ^= 1 << r.randrange(8)
    return bytes(changed)


def block(r: random.Random, b: bytes) -> tuple[int, int]:
    """Where a part of any size begins and ends."""
    start = r.randrange(len(b) + 1)
    return start, min(len(b), start + r.choice([1, 4, 16, 100, 1000, 10**5, len(b)]))


def moved(r: random.Random, b: bytes, other: bytes) -> bytes:
    start, end = block(r, b)
    rest = b[:start] + b[end:]
    i = r.randrange(len(rest) + 1)
    return rest[:i] + b[start:end] + rest[i:]


def doubled(r: random.Random, b: bytes, other: bytes) -> bytes:
    start, end = block(r, b)
    times = min(r.choice([1, 2, 50, 10**5]), 2**21 // (end - start + 1) + 1)
    return b[:end] + b[start:end] * times + b[end:]


def truncated(r: random.Random, b: bytes, other: bytes) -> bytes:
    i = r.randrange(len(b) + 1)
    return r.choice([b[:i], b[:i], b[i:], b[:i] + bytes(len(b) - i)])


def spliced(r: random.Random, b: bytes, other: bytes) -> bytes:
    """The beginning of one and the end of the other; or a part of the other at the same place."""
    start, end = block(r, other)
    i = r.choice([start, r.randrange(len(b) + 1)])
    return b[:i] + (other[start:] if r.randrange(2) else other[start:end] + b[i + end - start:])


def exchanged(r: random.Random, b: bytes, other: bytes) -> bytes:
    """A word, a number or a text in quotes, in the place of another."""
    for _ in range(r.choice([1, 1, 3, 20])):
        old = TOKEN.search(b, r.randrange(len(b) + 1))
        new = TOKEN.search(other, r.randrange(len(other) + 1))
        if old and new:
            b = b[:old.start()] + new[0] + b[old.end():]
    return b


def extreme(r: random.Random, b: bytes, other: bytes) -> bytes:
    """A number in digits or in bytes, and in its place one at the end of a type's range."""
    number = NUMBER.search(b, r.randrange(len(b) + 1))
    if number and r.randrange(3):
        return b[:number.start()] + r.choice(NUMBERS) + b[number.end():]
    width = r.choice([*PATTERNS])
    i = r.randrange(len(b) // width + 1) * width
    pattern = bytes.fromhex(r.choice(PATTERNS[width])) * r.choice([1, 1, 20])
    return b[:i] + pattern + b[i + len(pattern):]


def wild(r: random.Random, content: bytes, other: bytes) -> bytes:
    for _ in range(r.choice([1, 1, 1, 2, 5])):
        content = r.choice([flipped, moved, doubled, truncated, spliced, exchanged, exchanged,
                            extreme, extreme])(r, content, other)
    return content


def sealed(content: bytes) -> bytes:
    """A prompt or a checkpoint with its checksum set right, as who means harm would; any other
    content as it is."""
    try:
        tensors = safetensors.torch.load(content)
        size = int.from_bytes(content[:8], "little")
        about = json.loads(content[8:8 + size])["__metadata__"]
        key = folder.ABOUT if folder.ABOUT in about else "state"
        state = json.loads(about[key])
        state.pop("sha256", None)
        digest = folder.digest_of(tensors, state)
    except Exception:  # damaged too much
        return content
    if key == "state":
        about["sha256"] = digest
    else:
        about[key] = json.dumps({**state, "sha256": digest})
    return safetensors.torch.save(tensors, about)


# --------------------------------------------------------------------------------------------------
# damage to a file in its place


def harmless(r: random.Random, path: Path) -> bool:
    """Another spelling of the same, if there is one."""
    content = path.read_bytes()
    if path.suffix in (".safetensors", ".gz", ".npy", ".html", ".lock") \
            or path.name in ("metrics.jsonl", "log.csv"):  # cut, or known, by their bytes
        return False
    if path.name != "tokenizer.json" and r.randrange(2):
        content = b"\xef\xbb\xbf" + content
    if path.suffix == ".json" and r.randrange(2) and content[:1] in b"{[" and b"\n{" not in content:
        content = json.dumps(json.loads(content), indent=2).encode()
    path.write_bytes(content.replace(b"\n", b"\r\n"))
    return True


def no_file(r: random.Random, path: Path) -> None:
    """Something that is no file with a content stands in its place."""
    path.unlink()
    how = r.randrange(8)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how == 2:
        path.symlink_to(path.name)
    elif how == 3:
        path.symlink_to("nowhere")
    elif how == 4:
        path.symlink_to(r.choice(["/dev/zero", "/dev/null"]))
    elif how == 5:
        with open(path, "wb") as f:
            f.truncate(2**32)
    elif how == 6:
        path.write_bytes(gzip.compress(bytes(2**26)) if path.suffix == ".gz" else b"x" * 2**22)


def damage(r: random.Random, path: Path, others: list[Path]) -> bool:
    """Damage a file; whether the damage means nothing. others: whole files like it."""
    if r.random() < 0.06 and harmless(r, path):
        return True
    if r.random() < 0.06:
        no_file(r, path)
        return False
    content, packed = path.read_bytes(), path.suffix == ".gz"
    if r.random() < 0.5:
        other = r.choice(others).read_bytes()
        if packed and r.randrange(2):
            content, other = gzip.decompress(content), gzip.decompress(other)
            path.write_bytes(gzip.compress(wild(r, content, other), mtime=0))
        else:
            changed = wild(r, content, other)
            path.write_bytes(sealed(changed) if r.randrange(2) else changed)
        return False
    some: list[Callable] = [damaged_bytes, other_content]
    if path.suffix == ".safetensors":
        some = [damaged_safetensors] * 5 + some
    elif path.name.lower().endswith((".jsonl", "c4.json", ".txt", ".csv")):
        some = [damaged_lines] * 4 + some
    elif path.suffix == ".json":
        some = [damaged_json] * 5 + some
    if packed and r.randrange(3):
        path.write_bytes(gzip.compress(r.choice([damaged_lines, damaged_bytes, other_content])(
            r, gzip.decompress(content)), mtime=0))
    else:
        path.write_bytes(r.choice(some)(r, content))
    return False
