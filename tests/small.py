"""A model that is faster than the bundled one, for what a trained one is not needed for: random
weights, and the bundled tokenizer."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import llama

TINY = Path(llama.__file__).parent / "tiny"


def make(folder: Path, **config) -> Path:
    """Write the model, always the same bytes. config: what it has of its own in config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        **json.loads((TINY / "config.json").read_text()), "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, **config}))
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(TINY / name, folder)
    with torch.device("meta"):
        wanted = llama.Llama(llama.read_config(folder / "config.json")).state_dict()
    g = torch.Generator().manual_seed(0)
    save_file({k: torch.randn(t.shape, generator=g).bfloat16() * 0.3 for k, t in wanted.items()},
              folder / "model.safetensors", {"format": "pt"})
    return folder


_made = tempfile.TemporaryDirectory()
MODEL = make(Path(_made.name) / "model", num_hidden_layers=3)  # which nobody changes
