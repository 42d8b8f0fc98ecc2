"""GGUF files: loaded by their path, and edited while their weights stay in packed blocks."""

import pytest
import torch
from torch import nn

from tests.edited import ELSEWHERE, FACTS, QUICK, TEXTS, logits, make_editor, same, untouched, wide_model
from tests.gguf_files import gguf_kernel, load_packed, write_gguf
from tests.tiny import tiny_tokenizer
from wise_fast import WiseEditor, models
from wise_fast.errors import StorageError, UnsupportedModelError, WiseError
from wise_fast.gradients import require_gradients, with_rows
from wise_fast.models import load_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A path by its type of quantization."""
    root = tmp_path_factory.mktemp("gguf")
    return {name: write_gguf(root / f"{name}.gguf", name) for name in ("Q8_0", "Q4_0")}


@pytest.fixture
def kernel():
    with gguf_kernel():
        yield


@pytest.fixture
def packed(files, kernel):
    return load_packed(files["Q8_0"])


def packed_weights(model):
    return {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}


@pytest.mark.parametrize("quantization, bits", [("Q8_0", 8.5), ("Q4_0", 4.5)])
def test_the_weights_are_packed_and_say_what_the_dequantized_ones_say(files, kernel, quantization, bits):
    from transformers import GgufConfig
    from transformers.integrations.gguf.utils import GgufEmbedding, GgufLinear

    model = load_packed(files[quantization])
    matrices = {name: m for name, m in model.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2}
    assert len(matrices) == 26 and {type(m) for m in matrices.values()} == {GgufLinear, GgufEmbedding}
    plain = load_packed(files[quantization], quantization_config=GgufConfig(dequantize=True))
    for name, module in matrices.items():
        weight = plain.get_submodule(name).weight
        assert module.weight.dtype == torch.uint8 and weight.dtype == torch.float32
        assert 8 * module.weight.nbytes == bits * weight.numel()
    for one, other in zip(logits(model), logits(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0"])
def test_an_edit_leaves_the_packed_weights_and_what_is_unrelated_alone(files, kernel, quantization, tmp_path):
    model, tokenizer = load_packed(files[quantization]), tiny_tokenizer()
    projection, stored, before = model.model.layers[2].feed_forward.w2, packed_weights(model), logits(model)
    elsewhere = logits(model, ELSEWHERE)
    editor = WiseEditor(model, tokenizer, QUICK)
    assert all(report.success for report in editor.edit(FACTS[:2]))
    assert editor.projection.base_layer is projection and not editor.projection.plain
    assert {editor.projection.dtype, editor.projection.values.dtype, editor.memories[0].values.dtype} == {torch.float32}
    for fact in FACTS[:2]:
        ids = tokenizer(f"{fact.prompt} {fact.target}")["input_ids"]
        prompt = len(tokenizer(fact.prompt)["input_ids"])
        with torch.no_grad(), editor.routing.prompt(torch.arange(len(ids))[None] < prompt):
            best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        assert best[prompt - 1 : -1] == ids[prompt:]
    assert same(logits(model, ELSEWHERE), elsewhere)
    edited = logits(model)
    assert not same(edited[:2], before[:2])
    editor.unload()
    after = packed_weights(model)
    assert after.keys() == stored.keys() and all(torch.equal(after[name], stored[name]) for name in stored)
    assert model.model.layers[2].feed_forward.w2 is projection and same(logits(model), before)


def test_rolled_back_bit_for_bit(packed):
    editor = WiseEditor(packed, tiny_tokenizer(), QUICK)
    editor.edit(FACTS[0])
    with untouched(editor):
        pass
    first = logits(packed)
    editor.edit(FACTS[1])
    assert not same(logits(packed), first)
    editor.rollback(1)
    assert same(logits(packed), first)
    with editor.disabled():
        unedited = logits(packed)
    editor.rollback(1)
    assert same(logits(packed), unedited)


@torch.no_grad()
def test_cached_decoding_says_what_one_forward_says(packed):
    tokenizer = tiny_tokenizer()
    editor = WiseEditor(packed, tokenizer, QUICK)
    editor.edit(FACTS[0])
    prompt, ids = (tokenizer(t)["input_ids"] for t in (FACTS[0].prompt, f"{FACTS[0].prompt} {FACTS[0].target}"))
    with editor.routing.prompt(torch.arange(len(ids))[None] < len(prompt)):
        whole = packed(torch.tensor([ids])).logits[0]
    made = packed(torch.tensor([prompt]), use_cache=True)
    rows = [made.logits[0]]
    assert editor.routing.choice.tolist() == [0]
    for token in ids[len(prompt) :]:
        made = packed(torch.tensor([[token]]), past_key_values=made.past_key_values, use_cache=True)
        rows.append(made.logits[0])
    torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-4, atol=1e-4)


def test_a_pack_fits_the_same_file_alone(files, packed, kernel, tmp_path):
    editor = WiseEditor(packed, tiny_tokenizer(), QUICK)
    editor.edit(FACTS[:2])
    editor.save_pretrained(tmp_path / "pack")
    model = load_packed(files["Q8_0"])
    WiseEditor.from_pretrained(model, tiny_tokenizer(), tmp_path / "pack")
    assert same(logits(model), logits(packed))
    for other in (load_packed(files["Q4_0"]), wide_model("lfm2")):
        with pytest.raises(StorageError, match="another base model"):
            WiseEditor.from_pretrained(other, tiny_tokenizer(), tmp_path / "pack")
    with pytest.raises(WiseError, match="quantized, offloaded or cut over ranks"):
        editor.export_dense(tmp_path / "dense")


def test_layers_get_as_many_rows_as_their_gradient_takes(packed):
    editor = WiseEditor(packed, tiny_tokenizer(), QUICK)
    fewest = require_gradients(packed, editor.architecture, torch.float32)
    names = {name for name, m in packed.named_modules() if type(m).__name__ == "GgufLinear"}
    assert fewest == {n: 16 for n in names if n.startswith("model.layers.3.") or n == "lm_head"} and len(fewest) == 8
    plain = make_editor(family="lfm2")
    assert require_gradients(plain.model, plain.architecture, torch.float32) == {}


def test_the_gradient_at_few_tokens_is_that_of_the_dequantized_model(files, packed):
    from transformers import GgufConfig

    plain = load_packed(files["Q8_0"], quantization_config=GgufConfig(dequantize=True))
    found = []
    for model in (packed, plain):
        editor = WiseEditor(model, tiny_tokenizer(), QUICK)
        editor.tail.fewest = require_gradients(model, editor.architecture, torch.float32)
        ids = torch.tensor([[256, 70, 71, 72]])  # fewer than the kernel's limit, in all of the tail
        capture = editor.tail.capture(ids, torch.ones_like(ids))
        y = capture.main.clone().requires_grad_()
        logits = editor.tail.replay(capture, y, torch.tensor([1, 3]))
        found.append(torch.autograd.grad(logits.log_softmax(-1)[:, 65].sum(), y)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 3, 4), (16, 4), (5, 8, 4), (0, 4)])
def test_repeated_rows_change_neither_outputs_nor_gradients(shape):
    linear, seen = nn.Linear(4, 3), []

    def forward(x):
        seen.append(x.shape[:-1].numel())
        return linear(x)

    x = torch.randn(shape, requires_grad=True)
    made, expected = with_rows(16, forward)(x), linear(x)
    torch.testing.assert_close(made, expected)
    weights = torch.randn(made.shape)
    found, wanted = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (made, expected))
    torch.testing.assert_close(found, wanted)
    rows = x.shape[:-1].numel()
    assert seen == [max(rows, 16) if rows else 0]
    with_rows(16, forward)(x.detach())
    assert seen[1] == rows


def test_a_kernel_without_gradients_for_any_rows_is_refused(packed, monkeypatch):
    from transformers.integrations.gguf import utils

    monkeypatch.setattr(utils, "MAX_GEMV_ROWS", 1 << 20)
    editor = WiseEditor(packed, tiny_tokenizer(), QUICK)
    with pytest.raises(UnsupportedModelError, match=r"no right gradient passes through the quantized .*\.GgufLinear"):
        editor.edit(FACTS[0])
    assert editor.edits == []


# What `load_model` makes of a path.


@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_a_path_loads_the_model_and_its_tokenizer(files, as_type):
    model, tokenizer = load_model(as_type(files["Q8_0"]))
    assert not model.training and model.dtype == torch.float32 and model.config.model_type == "lfm2"
    assert not any(p.requires_grad for p in model.parameters())
    for text in TEXTS:
        assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [256, 257, 258]
    for one, other in zip(logits(model), logits(wide_model("lfm2")), strict=True):
        assert (one - other).norm() < 0.1 * other.norm()  # half of a 127th of a block's largest is lost
    assert WiseEditor(model, tokenizer, QUICK).edit(FACTS[0])[0].success


def test_a_path_loads_packed_weights_where_transformers_leaves_them(files, packed):
    model, tokenizer = load_model(files["Q8_0"])
    assert packed_weights(model).keys() == packed_weights(packed).keys() != set()
    assert same(logits(model), logits(packed))
    assert WiseEditor(model, tokenizer, QUICK).edit(FACTS[0])[0].success


def test_what_is_no_gguf_file_is_refused(files, tmp_path):
    whole, path = files["Q8_0"].read_bytes(), tmp_path / "model.gguf"
    for data, says in [(b"", "is not a GGUF file"), (b"PK\3\4" + whole, "is not a GGUF file")]:
        path.write_bytes(data)
        with pytest.raises(StorageError, match=says):
            load_model(path)
    for size in (4, 20, 1000, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(StorageError, match="cannot load a causal language model"):
            load_model(path)
    with pytest.raises(StorageError, match="does not exist; .*a .gguf file"):
        load_model("missing.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(StorageError, match="no config.json"):
        load_model(tmp_path / "folder.gguf")


def test_what_it_needs_is_named(files, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(WiseError, match=r"a GGUF file needs gguf, accelerate, .*pip install 'wise_fast\[gguf\]'$"):
        load_model(files["Q8_0"])
