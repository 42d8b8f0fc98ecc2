"""Saving and sharing an editor: directories, the hub, and plain checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from wise_fast import card, compiled, dense, fingerprint, hub, storage
from wise_fast.architectures import Architecture
from wise_fast.config import WiseConfig
from wise_fast.errors import WiseError
from wise_fast.state import EditorState
from wise_fast.turns import in_turn

if TYPE_CHECKING:
    from wise_fast.editor import WiseEditor


class PlainSaving:
    """`model.save_pretrained` of a model with an editor; a method, so that deepcopy follows it.

    What it would write names the edited projection's weight as the editor does, and loads without it.
    """

    def __init__(self, inner):
        self.inner = inner

    def save_pretrained(self, *args, **kwargs):
        if kwargs.get("state_dict", args[2] if len(args) > 2 else None) is None:
            raise WiseError(
                "model.save_pretrained would write a checkpoint that plain transformers loads without the edited "
                "projection; use editor.save_pretrained (the edits), editor.export_dense (a plain checkpoint with the "
                "edits folded in), or editor.unload() first (the model as it was)"
            )
        return self.inner(*args, **kwargs)


class Sharing:
    """The part of an editor that puts edits where others find them, and takes them from there."""

    model: nn.Module
    tokenizer: Any
    config: WiseConfig
    architecture: Architecture
    _state: EditorState

    @in_turn
    def save_pretrained(self, directory: str | os.PathLike, metrics: Mapping[str, float | None] | None = None) -> None:
        """Save the edits, compactly and without the base model, to a directory: new, empty, or one saved before.

        It is written in one step: whatever happens, the directory holds what it held before or all of the new.

        Args:
            metrics: figures for the edits card, such as `evaluate(editor).summary()`.

        Raises:
            ConfigError: a metric is not a number.
            StorageError: the directory holds other things or cannot be written; it is as it was, and so is the model.
        """
        base = fingerprint.describe(self.model, self.architecture)
        storage.save(directory, base, self.config, self._state, card.about(self.model, metrics))

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Save the edits to a model repository on the Hugging Face hub (HF_ENDPOINT), made if need be; gives its URL.

        Args:
            repo_id: "owner/name", or a name of your own.
            options: metrics (as `save_pretrained` takes them), private, revision (a branch that exists), message (of
                the commit), token (else the one that `hf auth login` keeps).

        Raises:
            WiseError: there are no edits to push.
            StorageError: the hub refuses or cannot be reached.
        """
        return hub.push(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        tokenizer,
        directory: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> WiseEditor:
        """Attach the editor saved in `directory` to its base model, which then answers exactly as the saved one did.

        The memories of the directory are closed: the next edit opens a new one.

        Args:
            model, tokenizer: the base model the edits were made on, without an editor, and its tokenizer.
            directory: one that `save_pretrained` wrote, or the id of a repository that `push_to_hub` made.
            revision, token: of that repository.

        Raises:
            StorageError: the directory is missing, damaged, changed, of a newer format, or made for another base
                model or dtype; or the hub has no such repository or cannot be reached. The model is as it was.
            ConfigError: the model has an editor already.
            UnsupportedModelError: the model's structure cannot be edited.
        """
        model = compiled.original(model)
        saved = storage.load(hub.local(directory, revision, token))
        fingerprint.check(saved.base, model, saved.config.layer)
        editor = cls(model, tokenizer, saved.config)
        try:
            editor._set_state(saved.state_on(editor.device))
        except BaseException:
            editor.unload()
            raise
        return editor

    @in_turn
    def export_dense(self, directory: str | os.PathLike, merge: str = "ties") -> None:
        """Write a plain transformers checkpoint with the memories folded into the projection's weight.

        **Routing is lost**: the edits then answer every prompt, and unrelated answers change; `wise_fast.dense.cost`
        measures how many. Several memories are merged into one first, which blurs the facts they hold.

        Args:
            directory: new or empty; loads with `AutoModelForCausalLM.from_pretrained`, tokenizer beside it.
            merge: of several memories, "ties" (by `config.density`) or "sum"; one memory is taken as it is.

        Raises:
            ConfigError: `merge` is neither.
            WiseError: there are no edits.
            StorageError: the directory is not empty, or cannot be written; nothing is left behind then.
        """
        dense.export(self, directory, merge)
