"""Does llama.cpp say under exported rows what this program says? Greedy text, token by token.

    python benchmarks/serving.py RUN --gguf FILE.gguf [--f32] [--questions 20]

RUN is of the model that FILE.gguf holds, and its questions are the run's evaluation data. This
program computes in float32, whatever the run did. Needs llama-cpp-python. With quantised weights
llama.cpp quantises the activations too, so the two part where tokens are nearly as likely; with
--f32 it gets the same weights as numbers of 32 bits.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama  # noqa: E402
import promptprior  # noqa: E402
from lab.evaluation import open_run  # noqa: E402
from lab.inputs import encode, evaluation_examples  # noqa: E402


class LlamaCpp:
    """A GGUF model with a run's rows in front of every text."""

    def __init__(self, gguf: str, rows: np.ndarray):
        """rows (n, hidden) float32, little-endian."""
        self.model = llama_cpp.Llama(gguf, n_ctx=2048, verbose=False)
        self.n, width = rows.shape
        batch = llama_cpp.llama_batch_init(self.n, width, 1)
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        batch.n_tokens = self.n
        for i in range(self.n):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, 0
        if llama_cpp.llama_decode(self.model.ctx, batch):
            raise SystemExit(f"serving: llama.cpp does not take the rows: is {gguf} of the run's "
                             "model?")
        llama_cpp.llama_batch_free(batch)

    def answer(self, ids: list[int], max_new: int, stop: set[int]) -> list[int]:
        """Greedy tokens after the rows and these."""
        self.model.n_tokens = self.n  # eval removes what stands behind them in the cache
        answer: list[int] = []
        while len(answer) < max_new and not (answer and answer[-1] in stop):
            self.model.eval(ids)
            logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
            ids = [int(np.ctypeslib.as_array(logits, (self.model.n_vocab(),)).argmax())]
            answer += ids
        return answer


def dequantised(gguf: str, folder: str) -> str:
    """The model of a GGUF file with weights in float32, in a new file."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    path = str(Path(folder) / "f32.gguf")
    if llama_cpp.llama_model_quantize(gguf.encode(), path.encode(), ctypes.byref(params)):
        raise SystemExit(f"serving: llama.cpp cannot dequantise {gguf}: leave out --f32")
    return path


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", metavar="RUN")
    p.add_argument("--gguf", required=True, metavar="FILE", help="the same model, for llama.cpp")
    p.add_argument("--f32", action="store_true", help="dequantise its weights first")
    p.add_argument("--questions", type=int, default=20)
    a = p.parse_args()
    opened = open_run(a.run, {"device": "cpu", "dtype": "float32"})
    settings, model, vocabulary = opened.settings, opened.model, opened.vocabulary
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.f32"
        if promptprior.main(["export", a.run, "--to", str(path), "--for", "llama.cpp"]):
            return 2
        about = json.loads(Path(f"{path}.json").read_text())
        rows = np.fromfile(path, "<f4").reshape(about["shape"])
        theirs = LlamaCpp(dequantised(a.gguf, folder) if a.f32 else a.gguf, rows)
    if about["order"][0] != "rows":
        raise SystemExit("serving: the rows of this run do not stand first: give another RUN")

    evals = evaluation_examples(settings.data)[:a.questions]
    questions = encode(evals, vocabulary, opened.max_length, "questions")
    equal = same_line = 0
    past, stop, most = opened.prompt.past(model), vocabulary.stop, settings.data.max_new
    for i in range(len(questions)):
        ids = questions.row(i).question
        with torch.no_grad():
            ours = llama.generate(model, [ids], past, most, stop)[0]
        other = theirs.answer(ids, most, stop)
        equal += ours == other
        same_line += vocabulary.first_line(ours) == vocabulary.first_line(other)
        if ours != other:
            k = next((k for k, pair in enumerate(zip(ours, other)) if pair[0] != pair[1]), 0)
            print(f"question {i + 1} parts at token {k + 1}: {vocabulary.decode(ours)!r}, "
                  f"llama.cpp {vocabulary.decode(other)!r}")
    print(f"{equal} of {len(questions)} answers equal token by token, {same_line} as text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
