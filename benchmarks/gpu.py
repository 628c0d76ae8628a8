"""On a GPU, in some eight minutes: steps and evaluation in bf16 beside PEFT's, at the shapes of
SmolLM2-135M and LLaMA 3.2 1B, and the kernels that attention takes.

    python benchmarks/gpu.py                              # the first GPU
    python benchmarks/gpu.py --device cpu --layers 1      # tries the script, in fp32

The weights are random and the questions the bundled ones, so that it needs the repository and
tests/requirements.txt alone. training.py and evaluation.py, which assert equality in fp32 before
they time, are processes of their own with what is left of --seconds; a part that fails or takes
longer says so, and the next begins. The table of kernels is of one step, forward and backward, of
32 questions: what PyTorch's scaled_dot_product_attention chose for each shape of its operands.
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch

import peers
import llama
import training

ROWS = 20


def run(script: str, flags: list[str], end: float) -> None:
    """Another benchmark, until the clock says end."""
    command = [sys.executable, peers.ROOT / f"benchmarks/{script}", *flags]
    print(f"\n{script} {' '.join(flags)}", flush=True)
    try:
        code = subprocess.run(command, timeout=max(end - time.monotonic(), 1)).returncode
    except subprocess.TimeoutExpired:
        code = "stopped for want of time"
    if code:
        print(f"{script}: {code}", flush=True)


def kernels(a) -> None:
    """Print the attention calls of a step by operator and shapes, with their share of its time."""
    _, model = peers.models(a, a.dtype)
    [batch] = peers.questions(a, 1)
    rows = torch.randn(ROWS, model.config.hidden_size, device=a.device) * 0.02
    prompt = llama.Prompt({0: rows.requires_grad_()})
    training.ours(model, prompt, batch, a.device)  # libraries choose and load at the first
    activities = [torch.profiler.ProfilerActivity.CPU]
    if a.device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        training.ours(model, prompt, batch, a.device)
        peers.synchronize(a.device)

    time_of = "self_device_time_total" if len(activities) > 1 else "self_cpu_time_total"
    total = sum(getattr(event, time_of) for event in profile.key_averages())
    print(f"\n{a.shape}, {a.dtype}: attention of one step; queries, keys and values are (batch, "
          "heads, tokens, width)")
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::_scaled_dot_product"):
            # Of a math call all that it calls counts, as it is no kernel of its own.
            spent = getattr(event, time_of.removeprefix("self_"))
            print(f"  {event.key.removeprefix('aten::_')}: {event.count} x "
                  f"{event.input_shapes[:3]}, {100 * spent / total:.1f} % of the step")


def main() -> None:
    a = peers.arguments(__doc__.split("\n\n")[0].replace("\n", " "),
                        seconds=(480, "that all parts may take"))
    end = time.monotonic() + a.seconds
    print(peers.machine(a))
    for shape in peers.SHAPES:
        a.shape, a.dtype = shape, "bfloat16" if a.device.startswith("cuda") else "float32"
        flags = ["--shape", shape, "--dtype", a.dtype, "--device", a.device,
                 *(["--layers", str(a.layers)] if a.layers else [])]
        kernels(a)
        run("training.py", [*flags, "--batches", "2"], end)
        run("evaluation.py", [*flags, "--batches", "1"], end)


if __name__ == "__main__":
    main()
