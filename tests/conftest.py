"""What every test shares: no network, no deadlines; where there is no GPU, kernels run in triton's interpreter and GPU
tests are skipped.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported, so before anything else

import pytest  # noqa: E402
import torch  # noqa: E402

try:
    import hypothesis
except ImportError:
    from tests import without_hypothesis

    without_hypothesis.install()
    import hypothesis

if not torch.cuda.is_available():
    # Read when triton is first imported: here, because transformers imports it, and torch alone does not.
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("wise_fast", deadline=None)  # no timing assertions: machines differ
hypothesis.settings.load_profile("wise_fast")


def pytest_collection_modifyitems(config, items):
    if "demo" not in config.getoption("-m"):
        left_out = [item for item in items if item.get_closest_marker("demo")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def little_to_read():
    """One held-out sentence instead of the packaged passages."""

    from tests.killed import one_sentence  # not at the top: most tests need neither
    from wise_fast import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "held_out_texts", one_sentence)
        yield


# Saved editors, of `tests.stored`, which is imported where it is needed: most tests need none.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with three edits in two memories; tests leave it as it is."""
    from tests.stored import MODES, make_editor

    directory = tmp_path_factory.mktemp("saved") / "editor"
    make_editor(3, **MODES["leverage"]).save_pretrained(directory)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of it, to be changed."""
    from tests.stored import contents

    directory = tmp_path / "editor"
    directory.mkdir()
    for name, data in contents(saved).items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture(scope="module")
def plain():
    """The base model that they are edits of; tests leave it as it is."""
    from tests.tiny import tiny_model

    return tiny_model("llama")
