"""What is served on a CUDA device: the answers of the CPU, all of it in one CUDA graph, which hears new edits."""

import pytest
import torch

from tests.edited import FACTS, make_editor
from tests.test_capacity import ROOM
from tests.test_ffn import LAYOUTS, inputs, make_bank, make_base
from wise_fast.ffn import DualMemoryLinear

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_module_on_a_device(layout, count):
    module = DualMemoryLinear(make_base())
    module.set_bank(make_bank(layout, (1e-3,) * count))
    a = inputs(3, 5)
    expected, choice = module(a), module.routing.choice
    module, a = module.cuda(), a.cuda()
    torch.testing.assert_close(module(a).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(module.routing.choice.cpu(), choice) and (choice >= 0).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(a)
    module.thresholds.fill_(torch.inf)
    graph.replay()
    torch.testing.assert_close(y, module.base_layer(a), rtol=1e-5, atol=1e-5)
    module.thresholds.fill_(1e-3)
    graph.replay()
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_graph_serves_what_is_put_into_its_room(layout):
    module, a = DualMemoryLinear(make_base()).cuda(), inputs(6, 5).cuda()
    module.reserve(*ROOM[layout], None, layout)
    module(a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(a)
    for count in (0, 1, 3):
        module.set_bank(make_bank(layout, (5.0,) * count, seed=count) if count else None)
        graph.replay()
        torch.testing.assert_close(y, module(a), rtol=1e-5, atol=1e-5)
        assert bool((module.routing.choice >= 0).any()) == (count > 0)


@torch.no_grad()
def test_a_graph_of_a_whole_model_hears_edits():
    editor = make_editor(shard_size=1, batch_size=1)
    editor.model.cuda()
    editor.reserve(memories=2)
    ids = editor.tokenizer(FACTS[0].prompt, return_tensors="pt")["input_ids"].cuda()

    def run():
        return editor.model(ids, use_cache=False).logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()
    choices = set()
    for fact in FACTS[:2]:
        editor.edit(fact)
        graph.replay()
        torch.testing.assert_close(logits, run(), rtol=1e-4, atol=1e-4)
        choices.add(int(editor.routing.choice))
    assert choices == {0}
