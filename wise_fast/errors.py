"""Errors of the library: each says what was given, what was expected and what to do, and leaves the model unchanged."""


class WiseError(Exception):
    """Base of every error that wise_fast raises on purpose."""


class ConfigError(WiseError, ValueError):
    """A setting is out of range, or does not fit the model at hand."""


class UnsupportedModelError(WiseError, ValueError):
    """The model's structure is not one that can be edited."""


class EditDataError(WiseError, ValueError):
    """An edit, or a file of edits, is not usable."""


class PackError(WiseError, ValueError):
    """A pack is not known, or cannot be served, asked for or changed as it was given or at this moment."""


class StorageError(WiseError, OSError):
    """A saved directory cannot be written, or cannot be trusted."""


class RankError(WiseError, RuntimeError):
    """A process of a distributed run failed or is gone, so the others stop as well."""
