# SPDX-License-Identifier: MIT
"""Nothing that comes with a model, a checkpoint or a text is executed, or becomes a control token. (What a model writes
is not evaluated either: a row of the rewards in test_data_and_models.py.)"""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grpo
from helpers.inputs import CHATML, change_json, make_byte_folder, make_tokenizer, refusal
from helpers.runs import TWINS, arguments


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    """With model/ and data.jsonl, where no test may leave a file "boom"."""
    make_byte_folder(tmp_path)
    monkeypatch.chdir(tmp_path)


class Bomb:
    """A pickle that leaves a mark when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("boom"),)


@TWINS
def test_a_pickle_in_a_checkpoint_is_not_run(script):
    checkpoint = Path("runs/a/checkpoint.pt")
    checkpoint.parent.mkdir(parents=True)
    torch.save(Bomb(), checkpoint)
    assert f"{checkpoint} cannot be loaded: " in refusal(script, arguments(script, resume=True))
    assert not Path("boom").exists()
    torch.load(checkpoint, weights_only=False)
    assert Path("boom").exists()


@TWINS
def test_a_pickle_of_weights_is_not_run(script):
    Path("model/model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, "model/pytorch_model.bin")
    assert "--model model cannot be loaded: " in refusal(script, arguments(script))
    assert not Path("boom").exists()
    torch.load("model/pytorch_model.bin", weights_only=False)
    assert Path("boom").exists()


@TWINS
@pytest.mark.parametrize("family", ["llama", "own"])
def test_code_beside_a_model_is_not_run_nor_is_the_user_asked_to(script, family, monkeypatch):
    """Its own code is named by the files of a model, whose family transformers knows or does not."""
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    Path("model/own.py").write_text("from pathlib import Path\nPath('boom').touch()\nclass Own: pass\n")
    change_json("model/tokenizer_config.json", auto_map=dict(AutoTokenizer=["own.Own", "own.Own"]))
    auto_map = dict(AutoConfig="own.Own", AutoModelForCausalLM="own.Own")
    change_json("model/config.json", auto_map=auto_map, model_type=family)
    if family == "own":
        assert "--model model" in refusal(script, arguments(script))
    else:
        script.train(arguments(script, num_steps=1))
    assert not Path("boom").exists()


@TWINS
def test_a_chat_template_is_rendered_in_a_sandbox(script):
    Path("model/chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.mkdir('boom') }}")
    assert "the chat template cannot write a question and an answer: " in refusal(script, arguments(script))
    assert not Path("boom").exists()


pieces = ["<s>", "<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<think>", "a", " ", "\n", "\ue000", "\ue001"]


@pytest.mark.parametrize(
    ("template", "make_prompt"),
    [(None, str), (CHATML, str), (CHATML, lambda text: [{"role": text, "content": text}])],
    ids=["text", "content", "role"],
)
@given(st.lists(st.sampled_from(pieces), min_size=1, max_size=12).map("".join))
def test_no_text_of_a_prompt_becomes_a_control_token_and_none_is_lost(template, make_prompt, text):
    """<think> is no control token: in a text, too, it is the one token that the model knows."""
    tokenizer = make_tokenizer(template)
    honest, attack = (grpo.encode_prompt(tokenizer, make_prompt(x)) for x in ("x", text))
    assert [attack.count(i) for i in range(3)] == [honest.count(i) for i in range(3)]
    copies = 2 if make_prompt("x") != "x" else 1
    assert attack.count(tokenizer.convert_tokens_to_ids("<think>")) == copies * text.count("<think>")
    assert text in tokenizer.decode(attack)
