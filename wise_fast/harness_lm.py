"""The harness's own Hugging Face model, routed on what it is asked and not on the answers it scores.

The plain `HFLM` works with an edited model too, but gives it context, continuation and padding as one text without a
mask, and the router would score all of it; then the options of one question may be answered by different memories.
"""

from __future__ import annotations

import copy

from lm_eval.models.huggingface import HFLM

from wise_fast.metrics import Row, readings


class EditedLM(HFLM):
    """`HFLM` of an editor's model. A continuation is scored behind its context, a whole document routed as one prompt.

    Args:
        editor: a `WiseEditor`, or another `wise_fast.metrics.Method`.
        settings: of `HFLM`, such as `max_length`.
    """

    def __init__(self, editor, **settings):
        tokenizer = copy.deepcopy(editor.tokenizer)  # it may be given a pad token
        super().__init__(pretrained=editor.model, tokenizer=tokenizer, **settings)
        self._editor = editor

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        found = readings(self._editor, [self._row(*request) for request in requests])
        return [(float(r.logp.sum()), bool((r.best == r.labels).all())) for r in found]

    def _row(self, texts, context: list[int], continuation: list[int]) -> Row:
        ids = (*context, *continuation)[-self.max_length - 1 :]  # the last one is scored, not read
        first = max(1, len(ids) - len(continuation))
        return Row(ids, first, len(ids) - 1 if texts is None else first)  # rolling windows come without their texts
