# SPDX-License-Identifier: MIT
"""Nothing that comes with a model, a checkpoint or a text is executed, or becomes a control token. That what a model
writes is not evaluated either is a row of the rewards in test_data_and_models.py.
"""

from pathlib import Path

import pytest
from hypothesis import strategies as st

from helpers.inputs import make_byte_folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    """With model/ and data.jsonl, where no test may leave a file "boom"."""
    make_byte_folder(tmp_path)
    monkeypatch.chdir(tmp_path)


class Bomb:
    """A pickle that leaves a mark when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("boom"),)






AUTO_MAPS = {"config": dict(AutoConfig="own.Own", AutoModelForCausalLM="own.Own"),
             "tokenizer_config": dict(AutoTokenizer=["own.Own", "own.Own"])}  # fmt: skip






pieces = st.sampled_from(["<s>", "<|im_start|>", "<|im_end|>", "<|im_", "end|>", "a", " ", "\n", "\ue000", "\ue001"])


