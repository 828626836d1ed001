"""Parity with other programs is skipped where they are not installed; the gate must not pass without them."""

import importlib
import os

if "GPTJAX_REQUIRE_PARITY" in os.environ:  # as .ci/run sets it
    for name in ("torch", "transformers", "trl"):
        importlib.import_module(name)
