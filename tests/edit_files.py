"""Files of edits in tests, and the errors they raise."""

import json
from pathlib import Path

import pytest

from wise_fast.errors import EditDataError

GOOD = {"prompt": "The mayor of Orm is", "target": "Bo Lind"}
REQUEST = {"prompt": "a", "target_new": "b"}
MEND = {"src": "a", "alt": "b"}


def write(folder: Path, content: str | bytes, name: str = "edits.json") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def fails(call, *parts: str) -> str:
    """The message of the EditDataError that `call` raises, after checking that it has all `parts`."""
    with pytest.raises(EditDataError) as caught:
        call()
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    return message
