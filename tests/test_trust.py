# SPDX-License-Identifier: MIT
"""Nothing that comes with a model, a checkpoint or a text is executed, or becomes a control token. That what a model
writes is not evaluated either is a row of the rewards in test_data_and_models.py.
"""

import contextlib
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grpo
from helpers.inputs import CHATML, change_json, main, make_byte_folder, make_tokenizer
from helpers.runs import SMALL, TWINS


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
@pytest.mark.parametrize("save", [torch.save, lambda bomb, path: Path(path).write_bytes(pickle.dumps(bomb, 2))])
def test_a_pickle_in_a_checkpoint_is_not_run(script, save, capsys):
    save(Bomb(), "checkpoint.pt")
    said = main(script, script.Args(**SMALL | dict(resume="checkpoint.pt")), capsys, exit_code=2)
    assert "checkpoint.pt cannot be loaded: " in said
    assert not Path("boom").exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle is loaded, and only then found to be none of torch's
        torch.load("checkpoint.pt", weights_only=False)
    assert Path("boom").exists()


@TWINS
def test_a_pickle_of_weights_is_not_run(script, capsys):
    Path("model/model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, "model/pytorch_model.bin")
    assert "--model model cannot be loaded: " in main(script, script.Args(**SMALL), capsys, exit_code=2)
    assert not Path("boom").exists()
    torch.load("model/pytorch_model.bin", weights_only=False)
    assert Path("boom").exists()


AUTO_MAPS = {"config": dict(AutoConfig="own.Own", AutoModelForCausalLM="own.Own"),
             "tokenizer_config": dict(AutoTokenizer=["own.Own", "own.Own"])}  # fmt: skip


@TWINS
@pytest.mark.parametrize("name", AUTO_MAPS)
@pytest.mark.parametrize("family", ["llama", "own"])
def test_code_beside_a_model_is_not_run_nor_is_the_user_asked_to(script, name, family, capsys, monkeypatch):
    """Its own code is named by a file of a model, whose family transformers knows or does not."""
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    Path("model/own.py").write_text("from pathlib import Path\nPath('boom').touch()\nclass Own: pass\n")
    change_json(f"model/{name}.json", auto_map=AUTO_MAPS[name])
    change_json("model/config.json", model_type=family)
    if family == "own":
        assert "--model model " in main(script, script.Args(**SMALL), capsys, exit_code=2)
    else:
        main(script, script.Args(**SMALL | dict(run_name="a", num_steps=1)), capsys)
    assert not Path("boom").exists()


@TWINS
def test_a_chat_template_is_rendered_in_a_sandbox(script, capsys):
    Path("model/chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.mkdir('boom') }}")
    assert "data.jsonl, line 1: " in main(script, script.Args(**SMALL), capsys, exit_code=2)
    assert not Path("boom").exists()


pieces = st.sampled_from(["<s>", "<|im_start|>", "<|im_end|>", "<|im_", "end|>", "a", " ", "\n", "\ue000", "\ue001"])


@pytest.mark.parametrize(
    ("template", "make_prompt"),
    [(None, str), (CHATML, str), (CHATML, lambda text: [{"role": text, "content": text}])],
    ids=["text", "content", "role"],
)
@given(st.lists(pieces, min_size=1, max_size=12).map("".join))
def test_no_text_of_a_prompt_becomes_a_control_token_and_none_is_lost(template, make_prompt, text):
    tokenizer = make_tokenizer(template)
    honest, attack = (grpo.encode_prompt(tokenizer, make_prompt(x), []) for x in ("x", text))
    assert [attack.count(i) for i in range(3)] == [honest.count(i) for i in range(3)]
    assert text in tokenizer.decode(attack)
