"""Keras on its torch backend. In a module of its own, because Keras reads its backend when it is imported."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"

from .. import promises
from .keras_ import Keras


class KerasTorch(Keras):
    name = "keras_torch"
    claims = promises.claims("keras_torch")
