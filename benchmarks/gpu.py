"""On a GPU, in some eight minutes: steps and evaluation in bf16 beside PEFT's, at the shapes of
SmolLM2-135M and LLaMA 3.2 1B, and the kernels that attention takes.

    python benchmarks/gpu.py                              # the first GPU
    python benchmarks/gpu.py --device cpu --layers 1      # tries the script, in fp32

The weights are random and the questions the bundled ones, so that it needs the repository and
tests/requirements.txt alone. training.py and evaluation.py, which assert equality in fp32 before
they time, are processes of their own with what is left of --seconds; after a part that fails or
takes longer the next begins, and the end says which they were. The table of kernels is of one step,
forward and backward, of 32 questions: what PyTorch's scaled_dot_product_attention chose for each
shape of its operands.
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch

import peers
import llama
import training


def run(script: str, flags: list[str], end: float) -> int | str:
    """Another benchmark, until the clock says end; 0 if it ended well, or what happened."""
    command = [sys.executable, peers.ROOT / f"benchmarks/{script}", *flags]
    print(f"\n{script} {' '.join(flags)}", flush=True)
    try:
        return subprocess.run(command, timeout=max(end - time.monotonic(), 1)).returncode
    except subprocess.TimeoutExpired:
        return "stopped for want of time"


def kernels(a) -> None:
    """Print the attention calls of a step by operator and shapes, with their share of its time."""
    _, model = peers.models(a, a.dtype)
    [batch] = peers.questions(a, 1)
    rows = torch.randn(a.tokens, model.config.hidden_size, device=a.device) * 0.02
    prompt = llama.Prompt({0: rows.requires_grad_()})
    training.ours(model, prompt, batch, a.device)  # libraries choose and load at the first
    # Where no activities are named, all that the machine has are recorded.
    with torch.profiler.profile(record_shapes=True) as profile:
        training.ours(model, prompt, batch, a.device)
        peers.synchronize(a.device)

    # An operator's time on the GPU is that of its kernels, which are events of their own, too.
    place, name = torch.autograd.DeviceType.CPU, "cpu_time_total"
    if a.device.startswith("cuda"):
        place, name = torch.autograd.DeviceType.CUDA, "device_time_total"
    total = sum(getattr(event, f"self_{name}") for event in profile.key_averages()
                if event.device_type == place and not event.is_user_annotation)
    print(f"\n{a.shape}, {a.dtype}: attention of one step; queries, keys and values are (batch, "
          "heads, tokens, width); of the math path the forward alone is listed")
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::_scaled_dot_product"):
            first = event.key.endswith("_backward")  # behind the gradient of the output
            print(f"  {event.key.removeprefix('aten::_')}: {event.count} x "
                  f"{event.input_shapes[first:first + 3]}, "
                  f"{100 * getattr(event, name) / total:.1f} % of the step")


def main() -> None:
    a = peers.arguments(__doc__.split("\n\n")[0].replace("\n", " "),
                        seconds=(480, "that all parts may take"))
    end, failed = time.monotonic() + a.seconds, []
    print(peers.machine(a))
    for shape in peers.SHAPES:
        a.shape, a.dtype = shape, "bfloat16" if a.device.startswith("cuda") else "float32"
        flags = ["--shape", shape, "--dtype", a.dtype, "--device", a.device,
                 *(["--layers", str(a.layers)] if a.layers else [])]
        kernels(a)
        for script, batches in (("training.py", "2"), ("evaluation.py", "1")):
            if status := run(script, [*flags, "--batches", batches], end):
                failed.append(f"{script}, {shape}: {status}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
