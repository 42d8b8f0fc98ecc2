"""Models in half precision, offloaded or quantized are edited, served and saved like any other."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.edited import FACTS, QUICK, logits, same, saved_model, wide_model
from tests.gguf_files import gguf_kernel, load_packed, write_gguf
from tests.test_architectures import hooks
from tests.tiny import tiny_tokenizer
from wise_fast import WiseEditor
from wise_fast.errors import StorageError, UnsupportedModelError, WiseError
from wise_fast.ffn import DualMemoryLinear
from wise_fast.fingerprint import describe
from wise_fast.metrics import answer
from wise_fast.mlp import DualMemoryFFN


class Packed(nn.Module):
    """A linear map whose weight is packed two to a byte, as 4-bit layers are."""

    gradients = True

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        whole = (linear.weight.detach() / scale).round().to(torch.int64) + 8
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((whole[:, ::2] * 16 + whole[:, 1::2]).to(torch.uint8), requires_grad=False)

    def forward(self, x):
        halves = torch.stack([self.weight // 16, self.weight % 16], -1).flatten(1)
        weight = ((halves.to(x.dtype) - 8) * self.scale).to(x.dtype)
        return nn.functional.linear(x if self.gradients else x.detach(), weight)


class Inference(Packed):
    """One whose kernel has no gradient, and does not say so."""

    gradients = False


def packed(kind=Packed):
    model = wide_model()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, kind(getattr(layer.mlp, name)))
    return model


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    model = wide_model()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def bitsandbytes(**settings):
    def make():
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        return loaded(dtype=torch.float32, device_map="cpu", quantization_config=BitsAndBytesConfig(**settings))

    return make


def gguf():
    return load_packed(write_gguf(DIRECTORY[0] / "model.gguf"))


def offloaded(how):
    def make():
        accelerate = pytest.importorskip("accelerate")
        if how == "cpu":
            return accelerate.cpu_offload(wide_model(), execution_device=torch.device("cpu"))
        names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
        places = dict.fromkeys(names, "cpu") | {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
        return loaded(device_map=places)

    return make


DIRECTORY = []


@pytest.fixture(scope="module", autouse=True)
def checkpoint(tmp_path_factory):
    DIRECTORY[:] = [tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("offloaded")]
    saved_model(DIRECTORY[0])
    with gguf_kernel():
        yield


def loaded(**settings):
    return AutoModelForCausalLM.from_pretrained(DIRECTORY[0], offload_folder=DIRECTORY[1], **settings)


PLACES = {
    "bf16": lambda: wide_model().bfloat16(),
    "fp16": lambda: wide_model().half(),
    "device_map auto": lambda: loaded(device_map="auto"),
    "cpu offload": offloaded("cpu"),
    "disk offload": offloaded("disk"),
    "packed": packed,
    "torchao int8": torchao_int8,
    "bitsandbytes 8 bits": bitsandbytes(load_in_8bit=True),
    "GGUF": gguf,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["neuron", "element"])
@pytest.mark.parametrize("name", PLACES)
def test_from_the_first_edit_to_the_loaded_pack(name, layout, tmp_path):
    model, tokenizer = PLACES[name](), tiny_tokenizer()
    stored = {key: (t.dtype, t.device) for key, t in model.state_dict().items()}
    before = logits(model)
    protected = layout == "neuron"
    changes = {} if protected else dict(layout="element", protect=False, route_by="score")
    editor = WiseEditor(model, tokenizer, QUICK.replace(**changes))
    assert same(logits(model), before)
    reports = editor.edit(FACTS[:2])
    assert all(report.success for report in reports)
    module, dtype = editor.projection, before[0].dtype
    assert editor.memories[0].values.dtype == torch.float32 and module.values.dtype == module.dtype == dtype
    assert module.values.device == module.device == torch.device("cpu")
    given = tokenizer(FACTS[0].prompt, return_tensors="pt")
    made = model.generate(**given, do_sample=False, max_new_tokens=6)
    assert tokenizer.decode(made[0], skip_special_tokens=True) == f"{FACTS[0].prompt} {FACTS[0].target}"
    edited = logits(model)
    editor.reserve(memories=2)
    for one, other in zip(logits(model), edited, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    editor.save_pretrained(tmp_path / "pack")
    editor.unload()
    assert same(logits(model), before)
    assert {key: (t.dtype, t.device) for key, t in model.state_dict().items()} == stored
    WiseEditor.from_pretrained(model, tokenizer, tmp_path / "pack")
    assert same(logits(model), edited)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_a_pack_does_not_care_where_the_weights_are(how, tmp_path):
    editor = WiseEditor(wide_model(), tiny_tokenizer(), QUICK)
    editor.edit(FACTS[0])
    editor.save_pretrained(tmp_path / "pack")
    model = offloaded(how)()
    other = WiseEditor.from_pretrained(model, tiny_tokenizer(), tmp_path / "pack")
    assert describe(model, other.architecture) == describe(editor.model, editor.architecture)
    for one, two in zip(logits(editor.model), logits(model), strict=True):
        torch.testing.assert_close(one, two)


def test_offloading_an_edited_model():
    accelerate = pytest.importorskip("accelerate")
    editor = WiseEditor(wide_model(), tiny_tokenizer(), QUICK)
    editor.edit(FACTS[0])
    expected = logits(editor.model)
    accelerate.cpu_offload(editor.model, execution_device=torch.device("cpu"))
    assert editor.projection.weight.is_meta and not editor.projection.plain
    for one, two in zip(logits(editor.model), expected, strict=True):
        torch.testing.assert_close(one, two)
    assert editor.edit(FACTS[1])[0].success


def test_a_quantized_model_is_another_base_model(tmp_path):
    editor = WiseEditor(wide_model(), tiny_tokenizer(), QUICK)
    editor.edit(FACTS[0])
    editor.save_pretrained(tmp_path / "pack")
    model = packed()
    with pytest.raises(StorageError, match="another base model"):
        WiseEditor.from_pretrained(model, tiny_tokenizer(), tmp_path / "pack")
    assert not hooks(model) and isinstance(model.model.layers[2].mlp.down_proj, Packed)


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_in_4_bits_teaches_where_its_kernel_has_a_gradient():
    """On some CPUs it is repacked in the first forward, for a kernel that has none."""
    model = bitsandbytes(load_in_4bit=True)()
    logits(model)
    editor, layer = WiseEditor(model, tiny_tokenizer(), QUICK), model.model.layers[3].mlp.up_proj
    x, along = (torch.randn(1, 3, layer.in_features) for _ in range(2))
    y = layer(x.requires_grad_())
    gradient = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)
    slope = float((layer(x + along) - layer(x - along)).sum() / 2)
    if float((gradient * along).sum()) == pytest.approx(slope, rel=0.1, abs=0.1):
        assert editor.edit(FACTS[0])[0].success and answer(editor, [FACTS[0].prompt]) == [FACTS[0].target]
        return
    with pytest.raises(UnsupportedModelError, match="no right gradient passes through"):
        editor.edit(FACTS[0])


@pytest.mark.filterwarnings("ignore")
def test_layers_without_gradients_serve_but_do_not_teach():
    model = packed(Inference)
    editor = WiseEditor(model, tiny_tokenizer(), QUICK)
    before = logits(model)
    with pytest.raises(UnsupportedModelError, match="no right gradient passes through"):
        editor.edit(FACTS[0])
    assert editor.edits == [] and same(logits(model), before)
    editor.unload()
    last = WiseEditor(model, tiny_tokenizer(), QUICK.replace(layer=3))
    assert last.edit(FACTS[0])[0].steps > 0


def test_what_is_not_there_is_refused(tmp_path):
    model = wide_model()
    model.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match="is not loaded: model.layers.1"):
        WiseEditor(model, tiny_tokenizer())
    editor = WiseEditor(packed(), tiny_tokenizer(), QUICK)
    editor.edit(FACTS[0])
    with pytest.raises(WiseError, match="quantized, offloaded or cut over ranks"):
        editor.export_dense(tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_the_module_on_its_own():
    base = Packed(nn.Linear(16, 8))
    module = DualMemoryLinear(base, dtype=torch.float32)
    x = torch.randn(2, 3, 16)
    assert torch.equal(module(x), base(x)) and (module.in_features, module.out_features) == (16, 8)
    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Packed(nn.Linear(16, 8)))
    assert DualMemoryFFN.from_mlp(mlp).projection.base_layer.weight.dtype == torch.uint8


def test_nothing_of_this_is_imported_where_it_is_not_used():
    code = "import sys, wise_fast; print([m for m in ('torchao', 'bitsandbytes') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
