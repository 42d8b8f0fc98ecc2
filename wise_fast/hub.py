"""Saved edits on the Hugging Face hub (or what HF_ENDPOINT names): pushed as a model repository, fetched by id."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import validate_repo_id

from wise_fast import atomic, storage
from wise_fast.errors import StorageError, WiseError


def push(
    editor,
    repo_id: str,
    *,
    metrics: Mapping[str, float | None] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Save edits",
    token: str | None = None,
) -> str:
    """`WiseEditor.push_to_hub`."""
    if not editor.edits:
        raise WiseError(f"the editor holds no edits, so there is nothing to push to {repo_id!r}; edit() first")
    try:
        validate_repo_id(repo_id)
        with tempfile.TemporaryDirectory(prefix="wise_fast.") as scratch:
            pack = Path(scratch) / "pack"
            editor.save_pretrained(pack, metrics)
            api = HfApi(token=token, library_name="wise_fast")
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=pack, commit_message=message, revision=revision)
    except WiseError:
        raise
    except Exception as error:  # the hub's own, or those of its HTTP client, which changes with its version
        raise StorageError(
            f"the edits were not pushed to {repo_id!r} ({_reason(error)}); check the name, the connection and the "
            "token (hf auth login)"
        ) from error
    return str(url)


def local(directory: str | os.PathLike, revision: str | None = None, token: str | None = None) -> str | os.PathLike:
    """The directory itself, or where the files of the hub repository of that id have been fetched to.

    What exists here is a directory, and so is what cannot be an id ("owner/name", or a name with `revision`).

    Raises:
        StorageError: it is here and a revision is wanted; it is neither here nor on the hub; or the hub cannot be
            reached and its cache has nothing.
    """
    wanted = revision is not None or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", os.fspath(directory))
    here = os.path.lexists(directory) or atomic.holds(directory, storage.CONFIG)
    if here and revision is not None:
        raise StorageError(f"{directory}: is a directory here, which has no revision {revision!r}; leave it out")
    if not isinstance(directory, str) or not wanted or here:
        return directory
    files = [storage.CONFIG, storage.EDITS, storage.MEMORY, storage.CARD]
    try:
        return snapshot_download(directory, revision=revision, token=token, allow_patterns=files)
    except Exception as error:  # as above
        raise StorageError(
            f"{directory!r} does not exist here, and is not to be had from the hub ({_reason(error)}); give a "
            "directory written by save_pretrained, or the id of a repository made by push_to_hub"
        ) from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
