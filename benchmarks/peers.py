"""What the benchmarks share: one set of random weights behind two front doors, ours and PEFT on
transformers; real questions as tokens; timing that takes turns; peak memory.

The weights are random, for speed does not depend on them and no download is wanted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers

import data
import llama
from lab.inputs import parse_spec
from lab.settings import TINY
from lab.train import keep_freed_memory

SHAPES = {  # name -> (dtype, config)
    "135m": ("float32", dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                             num_key_value_heads=3, intermediate_size=1536, vocab_size=49152,
                             rope_theta=100000.0)),
    "1b": ("bfloat16", dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
                            num_key_value_heads=8, intermediate_size=8192, vocab_size=128256,
                            rope_theta=500000.0)),
}


def arguments(description: str, **defaults) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--shape", choices=SHAPES, default="135m")
    p.add_argument("--layers", type=int, help="fewer layers than the shape has")
    p.add_argument("--dtype", help="of weights and activations (the shape's)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--data", default="squad", help="SPEC of the questions, as for train")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--tokens", type=int, default=20, help="prompt rows")
    p.add_argument("--repeats", type=int, default=5, help="timed turns of each, after a warm-up")
    p.add_argument("--seed", type=int, default=0, help="of weights, rows and the choice of batches")
    for flag, (default, text) in defaults.items():
        p.add_argument("--" + flag.replace("_", "-"), type=type(default), default=default,
                       help=text)
    a = p.parse_args()
    keep_freed_memory()  # both gain by it
    a.dtype = a.dtype or SHAPES[a.shape][0]
    return a


def models(a: argparse.Namespace, dtype: str, spread: float = 0.02):
    """The peer's model and ours on the same tensors, random from the seed with this deviation."""
    shape = {**SHAPES[a.shape][1], **({"num_hidden_layers": a.layers} if a.layers else {})}
    torch.manual_seed(a.seed)
    config = transformers.LlamaConfig(
        **shape, tie_word_embeddings=True, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        max_position_embeddings=4096, rms_norm_eps=1e-5,
        initializer_range=spread)
    peer = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).to(a.device).eval()
    peer.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        ours_config = llama.read_config(Path(folder) / "config.json")
    with torch.device("meta"):
        ours = llama.Llama(ours_config)
    weights = {name: t for name, t in peer.state_dict().items() if name != "lm_head.weight"}
    ours.load_state_dict(weights, assign=True)
    return peer, ours.requires_grad_(False)


def questions(a: argparse.Namespace, count: int) -> list[list[data.Row]]:
    """`count` batches of rows. The bundled data has the bundled tokenizer; other data one of 16,384
    byte-level BPE tokens trained on itself, which cuts it about as LLaMA's own does."""
    kind, path = parse_spec(a.data, 0)
    examples = [e for e in data.read(kind, path) if e.answers]
    folder = TINY
    with tempfile.TemporaryDirectory() as made:
        if ":" in a.data:
            folder = made
            bpe(examples).save(f"{made}/tokenizer.json")
        vocabulary = data.Vocabulary(folder, bos=1)
    rows = [r for e in examples if (r := data.encode(e, vocabulary, 1024))]
    order = data.Order([r.context for r in rows], a.batch_size, a.seed)
    return [[rows[i] for i in order[step]] for step in range(count)]


def bpe(examples: list[data.Example]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = sorted({t for e in examples for t in (e.context, e.question, *e.answers)})
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=16384, special_tokens=["<pad>", "<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def peft_model(peer, rows: torch.Tensor):
    """PEFT's prompt tuning of the peer's model, with our rows."""
    import peft

    model = peft.get_peft_model(peer, peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(rows)))
    model.prompt_encoder["default"].embedding.weight.data = rows.clone()
    return model


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(call, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(calls: dict, repeats: int, device: str):
    """Seconds of each call {name: [...]}, one after the other, so that a slow minute of the machine
    hits all; and the bytes that its warm-up held at most beyond what was there."""
    memory = {name: _peak(call, device) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return times, memory


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of the turns."""
    ratios = sorted(s / f for s, f in zip(times[slow], times[fast]))
    return statistics.median(ratios), ratios[0], ratios[-1]


def _peak(call, device: str) -> int:
    """Resident memory on the CPU, allocated memory on CUDA."""
    gc.collect()
    if device.startswith("cuda"):
        call()  # libraries make their own workspaces at the first
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory counts as there already
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def _memory(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return 1024 * int(line.split()[1])


def machine(a: argparse.Namespace) -> str:
    import peft

    if a.device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        names = [x.split(":")[1].strip() for x in info.read_text().splitlines()
                 if x.startswith("model name")] if info.exists() else []
        name = f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
    return (f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, "
            f"peft {peft.__version__}")
