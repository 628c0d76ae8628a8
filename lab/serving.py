"""A run's rows as programs take them that answer by input embeddings: vLLM, llama.cpp, numpy's
users.

    content = FORMS["vllm"](rows)                  # a file's bytes; rows (n, D)
    export_rows(opened, origin, Path("rows.pt"), "vllm", overwrite=False)

Such a program takes vectors where the embeddings of tokens would stand. So it can hold rows at the
token embeddings whose outputs go on, and no other prompt. Beside FILE comes FILE.json, which says
in which order rows, BOS and text stood in training: in another order the same rows say other
things.

n prompt rows, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shlex
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from lab.console import UserError, counted, say, show
from lab.evaluation import OpenRun
from lab.files import SMALL, free_place, replacing, write_file
from lab.folder import CONFIG


def torch_file(rows: Tensor) -> bytes:
    """A file of torch.save, which others open without unpickling code; in the dtype of rows."""
    file = io.BytesIO()
    torch.save(rows.detach().cpu().clone(), file)  # of a view it would write all that it views
    return file.getvalue()


def raw_floats(rows: Tensor) -> bytes:
    """float32, little-endian, row after row, without a header."""
    return rows.detach().cpu().float().numpy().astype("<f4").tobytes()


def numpy_file(rows: Tensor) -> bytes:
    """numpy's format, float32."""
    file = io.BytesIO()
    np.save(file, rows.detach().cpu().float().numpy().astype("<f4"))
    return file.getvalue()


FORMS = {"vllm": torch_file, "llama.cpp": raw_floats, "numpy": numpy_file}
KIND = "rows that export made"  # what --overwrite replaces


def sidecar(path: Path) -> Path:
    """The file that says how the rows at path stand."""
    return path.with_name(f"{path.name}.json")


def is_ours(path: Path) -> bool:
    """Whether export made the rows at path, by the sidecar."""
    with contextlib.suppress(data.DataError):
        about = data.read_json(sidecar(path), dict, SMALL)
        return about.get("file") == path.name and about.get("for") in [*FORMS]
    return False


def free_file(path: str, overwrite: bool) -> Path:
    """A path to which rows and their sidecar may be written."""
    path = Path(path)
    # A sidecar without rows is of an export that was cut short.
    for place, may_go in ((path, overwrite), (sidecar(path), overwrite or not path.exists())):
        free_place(place, "--to", may_go, lambda _: is_ours(path), KIND)
    return path


def rows_of(opened: OpenRun, form: str) -> Tensor:
    """The rows (n, D) of a run, in the model's dtype, as they enter the model. Raises UserError for
    a prompt that is more than rows at the token embeddings in front of the text."""
    prompt, asked = opened.prompt, opened.settings.prompt
    faults = []
    if prompt.is_prefix:
        faults.append(("has keys and values",
                       "--method prompt --prefix-layers 0 --reparam none --tokens 20"))
    elif [*prompt.layers] != [0]:
        layers = ", ".join(map(str, prompt.layers))
        faults.append((f"has rows at layers {layers}", "--deep-layers 0 --tokens 20"))
    if prompt.cut:
        faults.append(("drops its rows' outputs at each layer", "--keep"))
    if asked.place == "suffix":
        faults.append(("stands inside the text", "--place before"))
    if faults:
        found, flags = zip(*faults)
        config = shlex.quote(str(opened.run.path / CONFIG))
        raise UserError(
            f"{opened.run.path}: its prompt {' and '.join(found)}, and --for {form} is for rows "
            "at the token embeddings alone, whose outputs go on, in front of the text: train such "
            f"rows by train --config {config} {' '.join(flags)} --out NEW, and export these")
    return prompt.layers[0].to(opened.model.embeddings.dtype)


def order_of(opened: OpenRun) -> list[str]:
    """In which order rows, BOS, if a text has one, and the text stand."""
    bos = [] if opened.vocabulary.bos is None else ["bos"]
    if opened.settings.prompt.place == "after-bos":
        return [*bos, "rows", "text"]
    return ["rows", *bos, "text"]


def export_rows(opened: OpenRun, origin: dict, path: Path, form: str, overwrite: bool) -> None:
    """Write the rows of a run to path, and beside them what they are. origin: of which run."""
    rows = rows_of(opened, form)
    content, order, bos = FORMS[form](rows), order_of(opened), opened.vocabulary.bos
    dtype = str(rows.dtype).removeprefix("torch.") if form == "vllm" else "float32"
    about = {"file": path.name, "for": form, "shape": [*rows.shape], "dtype": dtype,
             "order": order, "bos_token_id": bos, "sha256": hashlib.sha256(content).hexdigest(),
             "run": origin}

    # The sidecar comes first: there are never rows of which nothing tells how they stand.
    beside, is_new = sidecar(path), not overwrite
    with replacing(path, is_new) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # nothing old goes before
        write_file(beside, (json.dumps(about, indent=2) + "\n").encode(),
                   is_new and not beside.exists())

    names = {"rows": "the rows", "bos": f"BOS (token {bos})",
             "text": "the text's tokens, without special ones"}
    say(f"in front of every answer stand {', then '.join(names[part] for part in order)}")
    n, width = rows.shape
    show(f"{path}: {counted(n, 'row')} of {width} numbers, {dtype}; {beside} says how they stand")
