"""From nothing to the first forward of a LLaMA 3.2 1B-shaped folder, ours and transformers'.

    python benchmarks/startup.py

And the time of --help. The folder is random, made first (2.5 GB), and removed. Every turn is a
process of its own. Times are of the load and a first forward of 8 tokens, which touches all
weights, without the imports; beside them the time to read the file. Files are in the page cache, as
from the second run on; from a cold disk all three wait for it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import peers

LOAD = {
    "ours": "import llama, torch\nload = lambda: llama.load(folder)\n"
            "go = lambda m: m.logits(m(ids)[0][:, -1])",
    "transformers": "import torch\nfrom transformers import LlamaForCausalLM\n"
                    "load = lambda: LlamaForCausalLM.from_pretrained(folder, dtype='auto')\n"
                    "go = lambda m: m(ids, logits_to_keep=1).logits",
    "reading": "import torch\ndef load():\n"
               "    with open(folder + '/model.safetensors', 'rb') as f:\n"
               "        while f.read(2**24): pass\ngo = lambda m: None"}
BODY = """
import time
from pathlib import Path
ids = torch.arange(8)[None]
start = time.perf_counter()
with torch.no_grad():
    out = go(load())
seconds = time.perf_counter() - start
memory = [x.split()[1] for x in Path('/proc/self/status').read_text().splitlines()
          if x.startswith(('VmHWM', 'RssAnon'))]
print(seconds, *memory, 0 if out is None else float(out.float().norm()))
"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--repeats", type=int, default=5)
    a = p.parse_args()
    root = Path(__file__).resolve().parent.parent
    a.device = "cpu"
    print(peers.machine(a))
    times = []
    for _ in range(a.repeats + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, root / "promptprior.py", "train", "--help"], check=True,
                       stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    print(f"train --help: {statistics.median(times[1:]):.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **peers.SHAPES["1b"][1], tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(
                folder, max_shard_size="10GB")
        found = {name: [] for name in LOAD}
        for _ in range(a.repeats + 1):
            for name, code in LOAD.items():
                out = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", f"folder = {folder!r}\n" + code + BODY],
                    cwd=root, capture_output=True, text=True)
                assert out.returncode == 0, out.stderr
                found[name].append(list(map(float, out.stdout.split())))
    assert abs(found["ours"][0][3] / found["transformers"][0][3] - 1) < 1e-2
    for name, turns in found.items():
        seconds, peak, own, _ = (statistics.median(x) for x in zip(*turns[1:]))
        print(f"{name:>12}: {seconds:.2f} s; most memory {peak / 2**20:.1f} GiB, in the end "
              f"{own / 2**20:.1f} GiB its own, the rest mapped files")
    print("faster by {:.2f} ({:.2f} to {:.2f})".format(*peers.ratio(
        {name: [turn[0] for turn in turns[1:]] for name, turns in found.items()},
        "transformers", "ours")))


if __name__ == "__main__":
    main()
