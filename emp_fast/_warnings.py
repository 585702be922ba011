"""The package's one warning category, and the place in the user's code that a warning names."""

from __future__ import annotations

import os
import sys
import warnings

import torch

__all__ = ["EmpFastWarning", "warn"]

#: Folders of code that is not the user's. Torch's loaders stand between a training loop and the
#: sampler.
_NOT_THE_USERS = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


class EmpFastWarning(UserWarning):
    """Something was handled but the user should know, such as a fallback or refused values."""


def warn(message: str) -> None:
    """Issues an `EmpFastWarning` that names the line of the user's code which led to it.

    Never call it in a training step: ``torch.compile`` cannot trace it.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, EmpFastWarning, stacklevel=level)
