"""jieba's dictionary as it was delivered, loaded once for the process (needs the extra ``zh``)."""

from __future__ import annotations

import functools
import importlib
import logging
import threading
import warnings
from typing import Any

__all__ = ["jieba_dictionary"]

_LOCK = threading.Lock()


def jieba_dictionary() -> tuple[Any, Any]:
    """A jieba tokenizer of our own, and the pattern that separates the stretches that it cuts.

    The shared one of ``jieba.cut`` depends on what else the process has done to it.

    Raises:
        ImportError: jieba is not installed.
    """
    with _LOCK:
        return _load()


@functools.cache
def _load() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a module that setuptools calls old
        jieba = importlib.import_module("jieba")
    words = jieba.Tokenizer()
    logger = logging.getLogger("jieba")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports each step of loading on stderr
    try:
        words.initialize()
    finally:
        logger.setLevel(level)
    return words, jieba.re_han_default
