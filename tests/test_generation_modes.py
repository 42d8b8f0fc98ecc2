"""Edited models under other ways to generate: assistants, streams, pipelines, threads; and what is refused."""

import threading

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer, pipeline

from tests.edited import FACTS, make_editor
from tests.routed import FIXED, NEW, PROMPTS, generate, world
from tests.tiny import tiny_model
from wise_fast.errors import WiseError


@pytest.fixture
def llama():
    return world("llama")


@pytest.fixture(scope="module")
def written():
    at = world("llama")
    return [at.tokenizer.decode(text, skip_special_tokens=True) for text in at.texts]


ASSISTANTS = {
    "unedited": lambda: dict(assistant_model=tiny_model("llama")),  # its drafts are often accepted
    "smaller": lambda: dict(assistant_model=tiny_model("llama", seed=3, num_hidden_layers=2)),
    "early exit": lambda: dict(assistant_early_exit=1),
    "prompt lookup": lambda: dict(prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("kind", ASSISTANTS)
def test_an_assistant_changes_nothing(llama, kind):
    """The first forward has drafted tokens behind the prompt, which take no part in the decision."""
    settings = ASSISTANTS[kind]()
    for prompt, choice, text in zip(PROMPTS, llama.choices, llama.texts, strict=True):
        made = generate(llama.model, llama.tokenizer, [prompt], **settings)
        assert torch.equal(made[0], text) and llama.editor.routing.choice.tolist() == [choice]


def test_sampled_rows_follow_the_decision_of_their_prompt(llama):
    """As many likely continuations as are asked for, each with the memory of its row: top_k 1 leaves one."""
    made = generate(llama.model, llama.tokenizer, PROMPTS, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(made, torch.stack(llama.texts).repeat_interleave(2, 0))


def test_a_streamer_prints_the_edited_answer(llama, written, capsys):
    for prompt, text in zip(PROMPTS, written, strict=True):
        streamer = TextStreamer(llama.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate(llama.model, llama.tokenizer, [prompt], streamer=streamer)
        assert capsys.readouterr().out == text + "\n"


def test_streams_of_several_threads_at_once(llama, written):
    """Each thread reads its own stream; a generation waits for the one before it."""
    settings = dict(skip_prompt=True, skip_special_tokens=True, timeout=30)
    streams = [TextIteratorStreamer(llama.tokenizer, **settings) for _ in PROMPTS]
    threads = [
        threading.Thread(target=generate, args=(llama.model, llama.tokenizer, [prompt]), kwargs=dict(streamer=stream))
        for prompt, stream in zip(PROMPTS, streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    assert ["".join(stream) for stream in streams] == written
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline(llama, written, batch_size):
    pipe = pipeline("text-generation", model=llama.model, tokenizer=llama.tokenizer)
    made = pipe(list(PROMPTS), batch_size=batch_size, return_full_text=False, **FIXED)
    assert [row[0]["generated_text"] for row in made] == written


def test_a_change_of_edits_waits_for_the_generation_at_hand():
    """One that came in between would change the memory that an answer was begun with."""
    editor = make_editor(FACTS[:1])
    changing, waited = threading.Thread(target=editor.rollback), []

    class Watching(TextStreamer):
        def put(self, value):
            if not waited:
                changing.start()
                changing.join(0.05)
            waited.append(changing.is_alive())

    given = editor.tokenizer(FACTS[0].prompt, return_tensors="pt")
    made = editor.model.generate(**given, streamer=Watching(editor.tokenizer), do_sample=False, max_new_tokens=NEW)
    changing.join()
    assert all(waited) and editor.edits == []
    assert editor.tokenizer.decode(made[0], skip_special_tokens=True).split()[-1] == FACTS[0].target


class TestRefused:
    def test_a_prefill_in_chunks(self, llama):
        ids, config = llama.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"], GenerationConfig()
        config.prefill_chunk_size = 3
        for args, settings in (([], {"prefill_chunk_size": 3}), ([], {"generation_config": config}), ([config], {})):
            with pytest.raises(WiseError, match="prefill_chunk_size"):
                llama.model.generate(ids, *args, **settings)
        assert torch.equal(generate(llama.model, llama.tokenizer, PROMPTS), torch.stack(llama.texts))

    def test_sequences_packed_into_one_row(self, llama):
        packed = dict(cu_seq_lens_q=torch.tensor([0, 2, 5], dtype=torch.int32), max_length_q=3)
        with pytest.raises(WiseError, match="a row of its own"):
            llama.model(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), **packed)
        assert torch.equal(generate(llama.model, llama.tokenizer, PROMPTS), torch.stack(llama.texts))
