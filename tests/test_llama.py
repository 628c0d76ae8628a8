"""llama.py against transformers, against PEFT, and against the literal recipe of the paper."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import llama

LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
VARIANTS = {
    "llama 1: all heads are key heads, untied": dict(
        num_key_value_heads=6, tie_word_embeddings=False, head_dim=8),
    "llama 2 70B: grouped, untied": dict(tie_word_embeddings=False),
    "llama 3.2: grouped, tied, llama3 rope": dict(rope_parameters=LLAMA3),
    "one key head": dict(num_key_value_heads=1),
    "linear rope": dict(rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=4.0)),
    "dynamic rope": dict(rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=2.0)),
    "yarn": dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=500.0, factor=8.0, original_max_position_embeddings=32)),
    "yarn with all that it may say": dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=500.0, factor=8.0, original_max_position_embeddings=32,
        beta_fast=8, beta_slow=2, mscale=0.7, mscale_all_dim=1.3, truncate=False)),
    "longrope": dict(rope_parameters=dict(
        rope_type="longrope", rope_theta=500.0, short_factor=[1.0, 1.1, 1.5, 2.0, 3.0],
        long_factor=[9.0] * 5, original_max_position_embeddings=64)),
    "attention and mlp bias": dict(attention_bias=True, mlp_bias=True),
    "default head_dim": dict(head_dim=None, rms_norm_eps=1e-5),
    "another name of silu": dict(hidden_act="swish"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(hf, token_ids, name):
    theirs, folder = hf(**VARIANTS[name])
    with torch.no_grad():  # biases start at 0 and norms at 1, where an omission would not show
        for key, p in theirs.named_parameters():
            if key.endswith("bias") or "norm" in key:
                p.normal_(1.0 if "norm" in key else 0.0, 0.3)
    theirs.save_pretrained(folder)
    ours, ids = llama.load(folder), token_ids(3, 60)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.abs().max() > 1  # or the comparison says nothing
        h, _ = ours(ids)
        torch.testing.assert_close(ours.logits(h), expected, atol=1e-4, rtol=0)
        past = ours.extend(ids[:, :23])  # and the same from a cache, in two pieces
        h, past = ours(ids[:, 23:40], past)
        h, _ = ours(ids[:, 40:], past)
        torch.testing.assert_close(ours.logits(h), expected[:, 40:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(hf, token_ids, dtype):
    theirs, folder = hf(dtype)
    ours, ids = llama.load(folder), token_ids(2, 40)
    assert ours.embeddings.dtype == dtype
    with torch.no_grad():
        exact = llama.load(folder, "float32").logits(llama.load(folder, "float32")(ids)[0])
        error = (ours.logits(ours(ids)[0]).float() - exact).abs().mean()
        # as near to the truth as theirs
        assert error <= 1.5 * (theirs(ids).logits.float() - exact).abs().mean()


def test_transformers_4_spelling_and_redundant_head(hf, token_ids):
    theirs, folder = hf(rope_parameters=LLAMA3)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {**rope, "type": rope.pop("rope_type")}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)
    save_file(weights, folder / "model.safetensors")
    ours, ids = llama.load(folder), token_ids(1, 50)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)[0]), theirs(ids).logits, atol=1e-4, rtol=0)


def other_head(weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).clone()


def head_alone(weights):
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")


def wrapped(weights):
    for name in [*weights]:
        weights["_orig_mod.module." + name] = weights.pop(name)


def wrapped_by_a_trainer(weights):
    """PEFT's and TRL's names, with the head beside the body."""
    for name in [*weights]:
        weights["base_model.model." + name] = weights.pop(name)
    weights["base_model.lm_head.weight"] = weights[
        "base_model.model.model.embed_tokens.weight"].flip(0).clone()


def with_buffers(weights):
    weights["step"] = torch.ones(1, dtype=torch.int64)
    weights["model.layers.0.self_attn.bias"] = torch.ones(4, dtype=torch.uint8)


def without_model(weights):
    for name in [*weights]:
        weights[name.removeprefix("model.")] = weights.pop(name)


def heads_of_trainers(weights):
    weights["v_head.summary.weight"], weights["score.weight"] = torch.ones(1, 48), torch.ones(2, 48)


@pytest.mark.parametrize("change, said", [
    (other_head, "lm_head.weight is another matrix"), (head_alone, None), (wrapped, None),
    (without_model, None), (heads_of_trainers, "2 tensors beside the decoder"),
    (wrapped_by_a_trainer, "lm_head.weight is another matrix"),
    (with_buffers, "1 tensors beside the decoder")])
def test_weights_as_people_have_them(hf, token_ids, change, said):
    """transformers 5.23 reads the first two as we do, and knows no wrapped names."""
    theirs, folder = hf()
    edit_weights(folder, change)
    if change in (other_head, head_alone):
        theirs = type(theirs).from_pretrained(folder)
    elif change is wrapped_by_a_trainer:
        theirs.config.tie_word_embeddings = False
        theirs.lm_head.weight = torch.nn.Parameter(theirs.get_input_embeddings().weight.flip(0))
    lines, ids = [], token_ids(1, 50)
    ours = llama.load(folder, report=lines.append)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)[0]), theirs(ids).logits, atol=1e-4, rtol=0)
    assert len(lines) == (said is not None) and all(said in line for line in lines)


@pytest.mark.parametrize("has_index", [True, False])
def test_shards(hf, token_ids, has_index):
    theirs, folder = hf()
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    if not has_index:
        (folder / "model.safetensors.index.json").unlink()
    ours, ids = llama.load(folder), token_ids(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)[0]), theirs(ids).logits, atol=1e-4, rtol=0)


def test_what_is_said_of_a_shard_elsewhere_helps(hf):
    """Its name alone, once the file is in the folder."""
    theirs, folder = hf()
    theirs.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    file = places["model.norm.weight"]
    for name in (str(folder / file), f"../{folder.name}/{file}"):
        index.write_text(json.dumps({"weight_map": places | {"model.norm.weight": name}}))
        with pytest.raises(llama.ModelError, match=f"'{name}'.*and write its name alone"):
            llama.load(folder)
    index.write_text(json.dumps({"weight_map": places}))
    assert llama.load(folder)


def test_a_tensor_of_two_shards(hf, token_ids):
    """What the message says to run takes it out of either of them."""
    theirs, folder = hf()
    theirs.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    name, ids = "model.norm.weight", token_ids(1, 9)
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    right = folder / places[name]
    wrong = next(folder / file for file in places.values() if file != right.name)
    weights = {k: t.clone() for k, t in load_file(wrong).items()}
    save_file(weights | {name: torch.zeros(48)}, wrong)
    with pytest.raises(llama.ModelError, match=f"'{name}' is in .* too") as e:
        llama.load(folder)
    command = re.search(r"`(python .*)`", str(e.value))[1].replace("python", sys.executable, 1)
    command = re.sub(r"\S+ \S+$", shlex.join([str(wrong), name]), command)  # not the right one
    subprocess.run(command, shell=True, check=True)
    ours = llama.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)[0]), theirs(ids).logits, atol=1e-4, rtol=0)


def test_tap_is_hidden_states(hf, token_ids):
    theirs, folder = hf()
    ours, ids, seen = llama.load(folder), token_ids(2, 12), {}
    with torch.no_grad():
        ours(ids, tap=seen.__setitem__)
        for i, h in enumerate(theirs(ids, output_hidden_states=True).hidden_states):
            torch.testing.assert_close(seen[i], h.flatten(0, 1), atol=1e-4, rtol=0)


def test_never_two_copies(hf):
    """bf16 on disk, fp32 in memory: the anonymous memory grows by the fp32 weights and no more."""
    _, folder = hf(torch.bfloat16, hidden_size=1024, intermediate_size=2048, num_attention_heads=8,
                   head_dim=128, num_hidden_layers=4, vocab_size=8000)
    before = _private_bytes()
    model = llama.load(folder, "float32")
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size > 100e6 and _private_bytes() - before < 1.25 * size


def test_weights_are_mapped_not_copied(hf):
    _, folder = hf(hidden_size=1024, intermediate_size=2048, num_attention_heads=8, head_dim=128,
                   num_hidden_layers=2, vocab_size=8000)
    before = _private_bytes()
    model = llama.load(folder)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size > 60e6 and _private_bytes() - before < size / 4
    assert not any(p.requires_grad for p in model.parameters())


def _private_bytes() -> int:
    """Anonymous memory of this process: what a second copy would be."""
    return int(next(x for x in open("/proc/self/status")
                    if x.startswith("RssAnon")).split()[1]) * 1024


# --------------------------------------------------------------------------------------------------
# the literal recipe: concatenate rows, run the layer, cut or keep the first n


def literal(model, rows, cut, ids):
    """Hidden states (B, T, D) after the final norm, of one sequence [rows | text] with no
    cache, in plain operations."""
    c, w = model.config, dict(model.named_parameters())
    n, (B, T) = next(iter(rows.values())).shape[0], ids.shape
    x = w["model.embed_tokens.weight"][ids]
    with_rows = False
    norm = lambda x, g: x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * g
    for i in range(c.num_hidden_layers):
        if i in rows:
            x = torch.cat((rows[i].expand(B, -1, -1), x[:, n:] if with_rows else x), dim=1)
            with_rows = True
        first = 0 if with_rows else n  # text stands at n.. whether rows are there or not
        S, p = x.shape[1], f"model.layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = ((h @ w[p + f"self_attn.{name}_proj.weight"].T).view(B, S, -1, c.head_dim)
                   for name in "qkv")
        f = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        angle = (torch.arange(first, first + S).float()[:, None] * f).repeat(1, 2)
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        half = lambda t: torch.cat((-t[..., c.head_dim // 2:], t[..., :c.head_dim // 2]), dim=-1)
        q, k = q * cos + half(q) * sin, k * cos + half(k) * sin
        k, v = (t.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, dim=2)
                for t in (k, v))
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) / c.head_dim**0.5
        score = score.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf)
        a = torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v).reshape(B, S, -1)
        x = x + a @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        x = x + (F.silu(h @ w[p + "mlp.gate_proj.weight"].T)
                 * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
        if cut and with_rows:
            x, with_rows = x[:, n:], False
    return norm(x[:, -T:], w["model.norm.weight"])


CASES = {"prompt tuning": ([0], False), "prompt tuning, cut": ([0], True),
         "the paper's deep": ([0, 2, 3], True), "deep, kept": ([0, 2, 3], False),
         "VPT-deep": ([0, 1, 2, 3], False), "all, cut": ([0, 1, 2, 3], True),
         "one in the middle": ([2], False), "one in the middle, cut": ([2], True),
         "last only": ([3], True)}


@pytest.mark.parametrize("name", CASES)
def test_literal_recipe(hf, token_ids, name):
    layers, cut = CASES[name]
    model = llama.load(hf()[1], torch.float64)
    ids, g = token_ids(3, 11), torch.Generator().manual_seed(1)
    rows = {i: torch.randn(5, 48, generator=g, dtype=torch.float64).requires_grad_()
            for i in layers}
    weight = torch.randn(3, 11, 48, generator=g, dtype=torch.float64)
    expected = literal(model, rows, cut, ids)
    gradients = torch.autograd.grad((expected * weight).sum(), list(rows.values()))

    h, _ = model(ids, model.prompt_past(rows, cut))
    torch.testing.assert_close(h, expected, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((h * weight).sum(), list(rows.values())),
                            gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-11)
        assert theirs.abs().max() > 1e-3

    # the beginning once, then two tails of it
    past = model.extend(ids[:1, :4], model.prompt_past(rows, cut))
    tails = torch.cat((ids[:1, 4:], ids[1:2, 4:]))
    h, _ = model(tails, past.take(torch.tensor([0, 0])))
    both = literal(model, rows, cut, torch.cat((ids[:1, :4].expand(2, -1), tails), dim=1))[:, 4:]
    torch.testing.assert_close(h, both, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(h.square().sum(), list(rows.values())),
                            torch.autograd.grad(both.square().sum(), list(rows.values()))):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_prompt_tuning_equals_peft(hf, token_ids):
    from peft import PromptTuningConfig, get_peft_model

    theirs, folder = hf()
    ours, ids = llama.load(folder), token_ids(2, 14)
    tuned = get_peft_model(theirs, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    rows = tuned.get_prompt_embedding_to_save("default").detach()
    with torch.no_grad():
        expected = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 6:]
        h, _ = ours(ids, llama.Prompt({0: rows}, cut=False).past(ours))
    torch.testing.assert_close(ours.logits(h), expected, atol=1e-4, rtol=0)


def test_generate(hf, token_ids):
    theirs, folder = hf()
    model = llama.load(folder)
    past = llama.Prompt({0: torch.randn(4, 48), 3: torch.randn(4, 48)}, cut=True).past(model)
    rows = [token_ids(1, T, seed=T)[0].tolist() for T in (7, 2, 11, 5)]
    full = llama.generate(model, rows, past, 12)
    assert all(len(r) == 12 for r in full)
    for row, answer in zip(rows, full):  # each token is the best one of a forward over all before
        h, _ = model(torch.tensor([row + answer]), past)
        best = model.logits(h[0, len(row) - 1:-1]).argmax(-1).tolist()
        assert best == answer
    stop = {full[0][3], full[2][6]}
    for whole, stopped in zip(full, llama.generate(model, rows, past, 12, stop)):
        end = next((i for i, t in enumerate(whole) if t in stop), 11)
        assert stopped == whole[: end + 1]
    ids = token_ids(1, 6)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(ids, max_new_tokens=9, do_sample=False)[0, 6:].tolist()
    assert llama.generate(model, ids.tolist(), None, 9) == [expected]
    with pytest.raises(llama.ModelError, match="BOS"):
        llama.generate(model, [[3], []], past, 4)


def test_padding_is_never_seen(hf, token_ids):
    model = llama.load(hf()[1])
    past = llama.Prompt({0: torch.randn(3, 48)}, cut=False).past(model)
    shared, tails = token_ids(2, 8), token_ids(2, 4, seed=2)
    shared[1, 5:] = llama.PAD
    with torch.no_grad():
        h, _ = model(tails, model.extend(shared, past))
        alone, _ = model(tails[1:], model.extend(shared[1:, :5], past))
    torch.testing.assert_close(h[1:], alone, atol=1e-5, rtol=0)


def test_gradients_of_a_shared_past_are_the_same_bytes_every_time():
    """Tails of one beginning add up in its gradient; with threads, t[parent] would in any order."""
    g = torch.Generator().manual_seed(0)
    t, parent = torch.randn(6, 2, 160, 32, generator=g), torch.randint(0, 6, (16,), generator=g)
    weight, threads = torch.randn(16, 2, 160, 32, generator=g), torch.get_num_threads()
    gradients = set()
    torch.set_num_threads(2)
    try:
        for _ in range(100):
            k = t.clone().requires_grad_()
            past = llama.Past((k,), (t,), torch.ones(6, 160).bool(), torch.zeros(6).long())
            (past.take(parent).keys[0] * weight).sum().backward()
            gradients.add(k.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(gradients) == 1


def test_a_kernel_may_return_heads_and_time_swapped(hf, token_ids, monkeypatch):
    """As the memory-efficient one on CUDA does."""
    model, ids = llama.load(hf()[1]), token_ids(2, 9)
    expected, kernel = model(ids)[0], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: kernel(
        *a, **k).transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(model(ids)[0], expected)


def test_rows_enter_in_the_models_dtype_and_stay_fp32(hf):
    model = llama.load(hf()[1], "bfloat16")
    prompt = llama.Prompt({0: torch.randn(3, 48).requires_grad_()})
    past = prompt.past(model)
    assert past.keys[0].dtype == torch.bfloat16 and prompt.layers[0].dtype == torch.float32
    past.keys[3].float().square().sum().backward()
    gradient = prompt.layers[0].grad
    assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


# --------------------------------------------------------------------------------------------------
# prompts as values


def random_prefix(*layers, n=3, G=2, hd=10):
    g = torch.Generator().manual_seed(0)
    return llama.Prompt({i: torch.randn(n, 2, G, hd, generator=g) for i in layers})


@pytest.mark.parametrize("prompt", [
    llama.Prompt({11: torch.randn(3, 48), 2: torch.randn(3, 48)}, cut=True),
    random_prefix(11, 2),
], ids=["rows", "prefix"])
def test_a_prompt_goes_to_tensors_and_back(prompt):
    trained = prompt._replace(layers={i: t.double().requires_grad_()
                                      for i, t in prompt.layers.items()})
    tensors = trained.tensors()
    assert [*tensors] == ["layers.2", "layers.11"]
    for t in tensors.values():
        assert t.dtype == torch.float32 and t.is_contiguous() and not t.requires_grad
    others = {"layers.2.sd": torch.ones(3), "layers.2.keys": torch.ones(3), "weight": torch.ones(1)}
    loaded = llama.Prompt.from_tensors({**tensors, **others}, cut=prompt.cut)
    assert loaded.cut == prompt.cut and loaded.is_prefix == prompt.is_prefix
    assert loaded.n == prompt.n == 3
    assert [*loaded.layers] == [2, 11]
    for i, t in loaded.layers.items():
        assert torch.equal(t, prompt.layers[i])


def test_vectors_are_flat_rows_in_the_order_of_memory():
    rows = torch.randn(3, 48)
    assert torch.equal(llama.Prompt({0: rows}).vectors()[0], rows)
    prefix = random_prefix(5)
    keys, values = prefix.layers[5].unbind(1)
    expected = torch.cat((keys.flatten(1), values.flatten(1)), dim=1)
    assert torch.equal(prefix.vectors()[5], expected)


def test_to_another_device():
    moved = llama.Prompt({0: torch.randn(3, 48)}, cut=True).to("meta")
    assert moved.layers[0].is_meta and moved.cut


# --------------------------------------------------------------------------------------------------
# prefixes: keys before rotation, and values


@pytest.fixture
def ragged(token_ids):
    """Rows of 7, 4 and 1 tokens."""
    ids = token_ids(3, 7, seed=4)
    ids[1, 4:] = llama.PAD
    ids[2, 1:] = llama.PAD
    return ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_keys_and_values_of_embeddings_are_what_the_first_layer_caches(hf, ragged, dtype):
    """At the beginning, and after rows that have reached different positions."""
    model = llama.load(hf()[1], dtype)
    ids = torch.tensor([5, 9, 30, 11])
    prompt = llama.Prompt({0: model.keys_and_values(0, model.embeddings[ids])})
    assert prompt.layers[0].shape == (4, 2, 2, 10)

    past, cached = prompt.past(model), model.extend(ids[None])
    assert past.position.tolist() == [4] and past.real.shape == (1, 0)
    torch.testing.assert_close(past.keys[0], cached.keys[0])
    torch.testing.assert_close(past.values[0], cached.values[0])
    assert past.keys[1] is None and past.values[1] is None

    before = model.extend(ragged)
    past, cached = prompt.past(model, before), model.extend(ids.expand(3, -1), before)
    assert past.position.tolist() == cached.position.tolist() == [11, 8, 5]
    torch.testing.assert_close(past.keys[0], cached.keys[0].roll(4, 2))  # the prompt's stand first
    torch.testing.assert_close(past.values[0], cached.values[0].roll(4, 2))
    assert torch.equal(past.keys[1], before.keys[1]) and torch.equal(past.real, before.real)


@pytest.mark.parametrize("after", ["nothing", "bos", "ragged rows"])
def test_a_prefix_of_the_keys_and_values_of_rows_is_these_rows(hf, token_ids, ragged, after):
    """Wherever it stands: cut rows of all layers and the prefix that the layers make of them."""
    model = llama.load(hf()[1], torch.float64)
    g = torch.Generator().manual_seed(0)
    rows = {i: torch.randn(4, 48, generator=g, dtype=torch.float64) for i in range(4)}
    prefix = llama.Prompt({i: model.keys_and_values(i, x) for i, x in rows.items()})
    before = {"nothing": None, "bos": model.extend(torch.tensor([[0]])),
              "ragged rows": model.extend(ragged)}[after]
    ids = token_ids(3, 9)
    expected, _ = model(ids, llama.Prompt(rows, cut=True).past(model, before))
    h, past = model(ids, prefix.past(model, before))
    torch.testing.assert_close(h, expected, atol=1e-12, rtol=1e-12)
    earlier, _ = model(ids, before)
    assert (h - earlier).abs().max() > 0.1  # the prefix matters


def test_a_prefix_enters_a_half_precision_model_and_stays_fp32(hf):
    model = llama.load(hf()[1], "bfloat16")
    prefix = random_prefix(0, 3)
    prefix.layers[3].requires_grad_()
    past = prefix.past(model)
    assert past.keys[0].dtype == past.values[3].dtype == torch.bfloat16
    exact = prefix.past(llama.load(hf()[1], "float32"))
    assert torch.equal(past.keys[3], exact.keys[3].bfloat16())  # rotated in fp32, rounded once
    past.keys[3].float().square().sum().backward()
    assert prefix.layers[3].grad.dtype == torch.float32


def test_gradient_of_a_prefix(hf, token_ids, ragged):
    """By finite differences, through the loss of a text after it."""
    model = llama.load(hf()[1], torch.float64)
    before, ids = model.extend(ragged), token_ids(3, 5)
    prefix = random_prefix(1, 3)

    def loss(*layers):
        past = model.prefix_past(dict(zip((1, 3), layers)), before)
        h, _ = model(ids[:, :-1], past)
        return F.cross_entropy(model.logits(h).flatten(0, 1), ids[:, 1:].flatten())

    layers = [t.double().requires_grad_() for t in prefix.layers.values()]
    gradients = torch.autograd.grad(loss(*layers), layers)
    assert all(t.abs().amax(dim=(0, 2, 3)).min() > 1e-5 for t in gradients)  # of keys and values
    assert torch.autograd.gradcheck(loss, layers, atol=1e-8)


def test_unrotated_inverts_the_rotation(hf, token_ids):
    """Of every layer's keys as a text leaves them in the cache, and of a prefix after it."""
    model, inputs = llama.load(hf(rope_parameters=LLAMA3)[1], torch.float64), {}
    ids = token_ids(1, 8)
    past = model.extend(ids, tap=inputs.__setitem__)
    for i, x in inputs.items():
        keys = model.keys_and_values(i, x)[:, 0]
        rotated = past.keys[i][0].transpose(0, 1)
        assert (rotated - keys).abs().max() > 0.1
        torch.testing.assert_close(model.unrotated(rotated, 0), keys, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(model.unrotated(rotated[3:5], 3), keys[3:5], atol=1e-6,
                                   rtol=1e-6)
    prefix = random_prefix(2)
    keys = prefix.past(model, past).keys[2][0, :, :3].transpose(0, 1)
    torch.testing.assert_close(model.unrotated(keys, 8), prefix.layers[2][:, 0].double(),
                               atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# attention weights


def eager(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("variant", [{}, {"num_key_value_heads": 6, "head_dim": 8}])
def test_attention_weights_equal_transformers(hf, token_ids, n, variant):
    """Without a prompt, and with rows that come first in a sequence of embeddings."""
    folder = hf(**variant)[1]
    theirs, ours, ids = eager(folder), llama.load(folder), token_ids(2, 9)
    rows, weights = torch.randn(n, 48), {}
    past = llama.Prompt({0: rows}).past(ours) if n else None
    with torch.no_grad():
        x = torch.cat((rows.expand(2, -1, -1), ours.embeddings[ids]), dim=1)
        expected = theirs(inputs_embeds=x, output_attentions=True).attentions
        h, _ = ours(ids, past, weights=weights.__setitem__)
        assert torch.equal(h, ours(ids, past)[0])  # looking changes nothing
    assert [*weights] == [0, 1, 2, 3]
    for i, w in weights.items():
        assert w.shape == (2, 6, 9, n + 9) and w.dtype == torch.float32
        torch.testing.assert_close(w, expected[i][:, :, n:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(w.sum(dim=-1), torch.ones(2, 6, 9))


def test_attention_weights_of_ragged_rows(hf, token_ids, ragged):
    """Prompt columns first, then the cached text, then the tokens; padding neither gives nor
    takes; each row's weights are those of the row alone."""
    model = llama.load(hf()[1])
    prompt = random_prefix(1, 3)
    tails = token_ids(3, 5)
    tails[0, 2:] = llama.PAD
    weights = {}
    with torch.no_grad():
        model(tails, model.extend(ragged, prompt.past(model)), weights=weights.__setitem__)
    for i, n in enumerate((0, 3, 0, 3)):  # the prompt's columns of each layer
        w = weights[i]
        assert w.shape == (3, 6, 5, n + 7 + 5)
        torch.testing.assert_close(w.sum(dim=-1), (tails != llama.PAD)[:, None].expand(
            -1, 6, -1).float())
        assert w[1, :, :, n + 4:n + 7].abs().max() == 0  # the cached text's padding
        if n:
            assert w[..., :n].sum() > 0
    for row, (cached, length) in enumerate(((7, 2), (4, 5), (1, 5))):
        alone = {}
        with torch.no_grad():
            past = model.extend(ragged[row:row + 1, :cached], prompt.past(model))
            model(tails[row:row + 1, :length], past, weights=alone.__setitem__)
        for i, n in enumerate((0, 3, 0, 3)):
            ours = torch.cat((weights[i][row, :, :length, :n + cached],
                              weights[i][row, :, :length, n + 7:n + 7 + length]), dim=-1)
            torch.testing.assert_close(ours, alone[i][0], atol=1e-5, rtol=1e-4)


def test_attention_weights_under_recomputation(hf, token_ids):
    """Each layer's are handed out once, and the gradient is the same."""
    model, ids = llama.load(hf()[1]), token_ids(2, 6)
    model.recompute = True
    rows, layers, gradients = torch.randn(3, 48).requires_grad_(), [], []
    for weights in (None, lambda i, w: layers.append(i)):
        h, _ = model(ids, llama.Prompt({0: rows}).past(model), weights=weights)
        gradients += torch.autograd.grad(h.square().sum(), rows)
    assert layers == [0, 1, 2, 3] and torch.equal(*gradients)


# --------------------------------------------------------------------------------------------------
# folders that cannot be used


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    weights = {k: v.clone() for k, v in weights.items()}
    change(weights)
    save_file(weights, folder / "model.safetensors")


def to_index(folder, file):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": file}}))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


SPOILT = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "other architecture": (lambda f: edit_config(f, model_type="gpt2"), "'gpt2'.*'llama'"),
    "other activation": (lambda f: edit_config(f, hidden_act="gelu"), "'gelu'"),
    "unknown rope": (lambda f: edit_config(
        f, rope_parameters={"rope_type": "su", "factor": 2.0}), "'su'"),
    "two ropes": (lambda f: edit_config(
        f, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rope_scaling={"rope_type": "linear", "factor": 2.0}), "delete the one"),
    "part of the head": (lambda f: edit_config(f, partial_rotary_factor=0.5), "partial_rotary"),
    "longrope of another width": (lambda f: edit_config(
        f, rope_parameters={"rope_type": "longrope", "short_factor": [1.0]}), "a list of 5"),
    "incomplete rope": (lambda f: edit_config(
        f, rope_parameters={"rope_type": "linear"}), "'factor'"),
    "heads do not divide": (lambda f: edit_config(f, num_key_value_heads=4), "divide"),
    "absurd size": (lambda f: edit_config(f, hidden_size="48"), "hidden_size is '48'"),
    "theta is a text": (lambda f: edit_config(f, rope_parameters=None, rope_theta="1e4"),
                        "rope_theta is '1e4'"),
    "tied is a text": (lambda f: edit_config(f, tie_word_embeddings="false"),
                       "tie_word_embeddings is 'false'"),
    "BOS outside": (lambda f: edit_config(f, bos_token_id=97), "bos_token_id is 97.*from 0 to 96"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "cut short": (cut_short, "cut short"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""),
                   "not a readable safetensors file"),
    "tensor missing": (lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")),
                       "lack 1 tensors.*norm"),
    "other shape": (lambda f: edit_weights(f, lambda w: w.update(
        {"model.norm.weight": torch.ones(7)})), r"\(7,\).*\(48,\)"),
    "left over": (lambda f: edit_weights(f, lambda w: w.update({"model.extra": torch.ones(7)})),
                  "'model.extra' has no place"),
    "more rows": (lambda f: edit_weights(f, lambda w: w.update(
        {"model.embed_tokens.weight": torch.ones(104, 48)})), '"vocab_size": 104'),
    "no head": (lambda f: edit_config(f, tie_word_embeddings=False),
                '"tie_word_embeddings": true'),
    "LoRA": (lambda f: edit_weights(f, lambda w: w.update(
        {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 48)})),
        "merge_and_unload"),
    "twice": (lambda f: edit_weights(f, lambda w: w.update({"norm.weight": torch.ones(48)})),
              "there twice"),
    "shard outside": (lambda f: to_index(f, "../model.safetensors"),
                      "not a file name in this folder"),
    "shard absolute": (lambda f: to_index(f, "/etc/passwd"), "not a file name in this folder"),
    "shard missing": (lambda f: to_index(f, "model-00001.safetensors"),
                      "model-00001.safetensors: no such file"),
    "empty index": (lambda f: ((f / "model.safetensors").unlink(),
                               (f / "model.safetensors.index.json").write_text("{}")),
                    "no weight_map"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_folder(hf, name):
    _, folder = hf()
    spoil, message = SPOILT[name]
    spoil(folder)
    with pytest.raises(llama.ModelError, match=message) as e:
        llama.load(folder)
    assert "\n" not in str(e.value)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize("config, name, dtype, method", [
    ({"quantization_config": BNB}, "mlp.up_proj.weight", torch.uint8, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "gptq"}}, "mlp.up_proj.qweight", torch.int32, "gptq"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "mlp.up_proj.weight", torch.uint32, "mlx"),
    ({}, "mlp.up_proj.weight", torch.float8_e4m3fn, "F8_E4M3")])
def test_quantised_folders_are_named_as_such(hf, config, name, dtype, method):
    _, folder = hf()
    edit_config(folder, **config)
    edit_weights(folder, lambda w: w.update(
        {f"model.layers.0.{name}": torch.zeros(7, 5).to(dtype)}))
    with pytest.raises(llama.ModelError, match=f"quantised by.*{method}.*dequantise it"):
        llama.load(folder)


def test_a_quantisers_settings_beside_plain_weights_are_no_matter(hf):
    """But for a method whose layers compute otherwise."""
    _, folder = hf()
    edit_config(folder, quantization_config=BNB)
    lines = []
    assert llama.load(folder, report=lines.append) and "they are used as they are" in lines[0]
    edit_config(folder, quantization_config={"quant_method": "bitnet"})
    with pytest.raises(llama.ModelError, match="quantised by bitnet"):
        llama.load(folder)


def test_an_adapter_beside_the_weights_is_not_passed_over(hf):
    _, folder = hf()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(llama.ModelError, match="merge it .* or delete the adapter's files"):
        llama.load(folder)


@pytest.mark.parametrize("rows", [{}, {4: (3, 48)}, {0: (3, 47)}, {0: (3, 48), 1: (2, 48)}])
def test_rows_that_do_not_fit(hf, rows):
    model = llama.load(hf()[1])
    with pytest.raises(llama.ModelError, match="do not fit a model of 4 layers and width 48"):
        model.prompt_past({i: torch.zeros(shape) for i, shape in rows.items()}, cut=True)


@pytest.mark.parametrize("layers", [
    {}, {0: (3, 2, 1, 10)}, {0: (3, 2, 2, 9)}, {0: (3, 1, 2, 10)}, {0: (0, 2, 2, 10)},
    {4: (3, 2, 2, 10)}, {-1: (3, 2, 2, 10)}, {0: (3, 2, 2, 10), 1: (2, 2, 2, 10)}, {0: (3, 40)}])
def test_prefixes_that_do_not_fit(hf, layers):
    model = llama.load(hf()[1])
    with pytest.raises(llama.ModelError, match="does not fit a model of 4 layers, 2 key heads"):
        model.prefix_past({i: torch.zeros(shape) for i, shape in layers.items()})
