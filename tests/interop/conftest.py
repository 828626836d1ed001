"""Parity with other programs is skipped where these are not installed, but for the gate, which must not pass without."""

import importlib
import os

if "GPTJAX_REQUIRE_PARITY" in os.environ:  # as .ci/run sets it
    for name in ("torch", "transformers", "trl"):
        importlib.import_module(name)
