"""Fixtures of all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the suite shares its cores with the actors it starts
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode adds nothing: `from tiny import tiny_model`

import hypothesis
import pytest

# The same examples each time, so that a suite that passes here passes everywhere; `make explore` looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer Llama with a tokenizer, shared by the session: never write into it."""
    from tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny"))
