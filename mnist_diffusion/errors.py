"""Errors that the user can put right."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right; commands print its message without a traceback."""


class ConfigError(UserError):
    """A field of the configuration has a value that cannot work."""


class FileError(UserError):
    """A file, folder or repository is missing, invalid, too large, or could run code, and is not read."""
