import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network
cache = tempfile.TemporaryDirectory()  # tokenizers that were made for a test are no user's
os.environ["PROMPTPRIOR_CACHE"] = cache.name
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads would stall each other
    os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# A kill loses nothing that was written, so no test in this process needs the disk itself, for which
# every run of a few steps would wait some 70 times.
os.fsync = lambda descriptor: None

import pytest  # noqa: E402
import torch  # noqa: E402

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4,
             num_attention_heads=6, num_key_value_heads=2, head_dim=10, max_position_embeddings=256,
             initializer_range=0.2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
             pad_token_id=None)


@pytest.fixture
def hf(tmp_path):
    """hf(**changes) -> (transformers model, its folder): small, random, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(dtype=torch.float32, **changes):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).to(dtype).eval()
        folder = tmp_path / f"hf{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture
def token_ids():
    return lambda B, T, seed=0: torch.randint(2, SMALL["vocab_size"], (B, T),
                                              generator=torch.Generator().manual_seed(seed))
