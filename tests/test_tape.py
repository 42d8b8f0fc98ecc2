"""What a capture keeps of what came before the projection."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.replays import LENGTHS, compare, make_tail, right_padded
from tests.tiny import FAMILIES, HIDDEN


def taped(capture):
    """The modules of whose outputs the tape has more than NaN."""
    return {
        n for n, calls in capture.tape.items() if any(v is not None and not v.isnan().any() for v in tree_leaves(calls))
    }


class TestWhatATapeKeeps:
    """Of what came before the projection, what a replay reads, and nothing else."""

    READ = {
        "llama": {"model.rotary_emb", "model.layers.1", "model.layers.2.self_attn"},
        "gemma3": {"model.rotary_emb", "model.layers.1", "model.layers.2.post_attention_layernorm"},
        "gpt2": {"transformer.h.1", "transformer.h.2.attn"},
        "gptj": {"transformer.h.1", "transformer.h.2.attn"},
    }

    @pytest.mark.parametrize("family", READ)
    def test_what_is_read(self, family):
        tail = make_tail(family, 2)
        capture = tail.capture(*right_padded(LENGTHS))
        assert taped(capture) == self.READ[family] < capture.tape.keys()
        for name in capture.tape.keys() - taped(capture):
            for value in tree_leaves(capture.tape[name]):
                assert value is None or (value.isnan().all() and value.untyped_storage().nbytes() < value.nbytes)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_is_less_than_all(self, family):
        tail, whole = make_tail(family), make_tail(family)
        whole._read_axes = lambda *captures: captures[0].axes
        some, all_ = (t.capture(*right_padded(LENGTHS)) for t in (tail, whole))
        assert some.tape.keys() == all_.tape.keys() and some.size < 0.7 * all_.size

    @pytest.mark.parametrize("reads", ["detached", "written", "compared", "longer"])
    def test_all_where_it_cannot_be_told(self, reads, monkeypatch):
        """Read without a gradient, or of some tokens or longer sequences alone; or written into."""
        tail = make_tail("llama", 2)
        mlp = tail.model.model.layers[2].mlp

        def detached(x):
            gate = mlp.gate_proj(x)
            return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x)) + gate.detach()[..., :HIDDEN]

        def written(x):
            return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).mul_(mlp.up_proj(x)))

        def compared(x):
            gate = mlp.gate_proj(x)
            loud = gate.detach().sum(-1, keepdim=True) > 0
            return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x)) + loud

        def longer(x):
            gate = mlp.gate_proj(x)
            found = mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x))
            return found + gate[..., :HIDDEN] if x.shape[1] > 3 else found

        forwards = dict(detached=detached, written=written, compared=compared, longer=longer)
        monkeypatch.setattr(mlp, "forward", forwards[reads])
        capture = tail.capture(*right_padded(LENGTHS))
        assert taped(capture) == capture.tape.keys()
        compare(tail, capture.rows(torch.tensor([2, 0])))

    def test_another_attention_later(self):
        tail = make_tail("gpt2", attn_implementation="eager")
        assert tail.axes
        tail.model.set_attn_implementation("sdpa")  # whose weights are None
        compare(tail, tail.capture(*right_padded(LENGTHS)).rows(torch.tensor([2, 0])))

    def test_it_is_asked_again_once_layers_need_rows(self, monkeypatch):
        """Kernels may have no gradient for as few rows as a first look has."""
        tail = make_tail("llama", 2)
        head = tail.model.model.norm

        def refused(x):
            if torch.is_grad_enabled() and "model.norm" not in tail.fewest:
                raise NotImplementedError("no gradient for so few rows")
            return type(head).forward(head, x)

        monkeypatch.setattr(head, "forward", refused)
        capture = tail.capture(*right_padded(LENGTHS))
        assert taped(capture) == capture.tape.keys()
        tail.give_rows({"model.norm": 64})
        assert taped(tail.capture(*right_padded(LENGTHS))) == self.READ["llama"]
