"""The package's own errors, and the shape of every message about a value that is refused."""

from __future__ import annotations


class TFBError(Exception):
    """Base class of the package's own errors."""


class UnsupportedModelError(TFBError, ValueError):
    """The model, adapter or layer cannot be Bayesianised; the message names it, the reason and the way out."""


class SamplingError(TFBError, RuntimeError):
    """A forward pass inside a sampling context cannot be served; the message names the reason and the way out."""


class ConfigError(TFBError, ValueError):
    """``tfb_config.json`` cannot be read or does not belong to this adapter; nothing was changed."""


class GuardError(UnsupportedModelError, SamplingError):
    """Several samples in one call of this model are not what separate passes give; the message names the difference."""


def refusal(what: object, got: object, expected: str, fix: str) -> ValueError:
    """The error about a value: ``what: got VALUE, expected WHAT. Fix: HOW``."""
    return ValueError(f"{what}: got {got}, expected {expected}. Fix: {fix}")
