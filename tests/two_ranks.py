"""What each rank of `test_tensor_parallel` runs: serve a saved pack, or teach, over a model that is cut over the ranks.

python -m torch.distributed.run --nproc-per-node 2 -m tests.two_ranks DIRECTORY {serve,teach}
"""

import faulthandler
import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, DistributedConfig

from tests.edited import FACTS, QUICK, logits
from tests.tiny import tiny_tokenizer
from wise_fast import WiseEditor
from wise_fast.errors import WiseError
from wise_fast.fingerprint import describe


def main(directory: Path, task: str) -> None:
    torch.set_num_threads(1)
    config = DistributedConfig(tp_plan="auto", tp_size=2)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory / "model", distributed_config=config),
        tiny_tokenizer(),
    )
    assert type(model.model.layers[2].mlp.down_proj.weight).__name__ == "DTensor"
    before = logits(model)
    if task == "serve":
        editor = WiseEditor.from_pretrained(model, tokenizer, directory / "pack")
    else:
        editor = WiseEditor(model, tokenizer, QUICK)
        assert all(report.success for report in editor.edit(FACTS[:2]))
    assert not editor.projection.plain
    try:
        editor.export_dense(directory / "dense")
        raise AssertionError("a part of a weight was folded")
    except WiseError as error:
        assert "cut over ranks" in str(error)
    batch = tokenizer([fact.prompt for fact in FACTS], return_tensors="pt", padding=True)
    made = model.generate(**batch, do_sample=False, max_new_tokens=6)
    found = dict(edited=logits(model), before=before, choice=editor.routing.choice, made=made)
    found |= dict(values=editor.projection.values, base=describe(model, editor.architecture))
    torch.save(found, directory / f"{task}{distributed.get_rank()}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(500, exit=True)  # where ranks wait for each other, it says where
    main(Path(sys.argv[1]), sys.argv[2])
