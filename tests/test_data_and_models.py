# SPDX-License-Identifier: MIT
"""Problems, prompts, rewards and models: real formats, one BOS, no problem skipped or trained on that is held out; and
what cannot be read or trained is said in one sentence, before what takes longer is loaded.
"""

import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import grpo
import ppo
from helpers.inputs import change_json, main, make_byte_folder, make_tokenizer, write_lines
from helpers.runs import arguments, make_folder
from helpers.tiny_models import make_model
from tools import sweep_families

sys.path.insert(0, str(grpo.TINY))
import pretrain

CPU = torch.device("cpu")
LINE = b'{"question": "one and one?", "answer": "2"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """With model/, which reads any text, and data.jsonl, a file of eight problems."""
    make_byte_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(**args) -> tuple:
    """The tokenizer, the ids that end a completion, the training and the held-out problems."""
    return grpo.load_problems(grpo.check_args(arguments(grpo, **args)), CPU)


def assert_refused(says: str, script, capsys, **args) -> None:
    assert says in main(script, arguments(script, **args), capsys, exit_code=2)
    assert not Path("runs").exists()


@pytest.fixture
def no_weights_are_loaded(monkeypatch) -> None:
    for script in (grpo, ppo):
        monkeypatch.setattr(script, "load_policy", None)  # a traceback for whoever calls it


def named(cases: dict[str, tuple]) -> list:
    return [pytest.param(*case, id=name) for name, case in cases.items()]


# ----- Lines of problems -----




ANSWER = 'line 1: "answer" must be a string that ends in one number, alone or after ####'
TYPES = 'line 1: a prompt must be a text or a list of {"role": text, "content": text}'
WRONG_ANSWERS = b"2", b"null", b'"12,5"', b'"#### - 3"', b'"two"'
WRONG_PROMPTS = (
    b"null", b"[]", b'["one?"]', b'{"role": "user", "content": "x"}', b'[{"role": "user"}]', b'[{"content": "x"}]',
    b'[{"role": "user", "content": null}]', b'[{"role": "user", "content": "x"}, "x"]',
)  # fmt: skip
BAD_LINES = {
    "empty": (b"", "data.jsonl is empty: it must hold one JSON object per line"),
    "blank": (b"\n \n\r\n", "data.jsonl is empty"),
    "half a line": (LINE * 3 + b'{"question": "one and', "data.jsonl, line 4: "),
    "a list": (LINE + b"\n[1, 2]", "data.jsonl, line 3: "),
    "not UTF-8": (LINE * 4 + b'{"question": "\xff?", "answer": "2"}', "data.jsonl, line 5: "),
    "UTF-16": (LINE.decode().encode("utf-16"), "data.jsonl, line 1: "),
    "deep": (LINE + b"[" * 100_000, "data.jsonl, line 2: "),
    "surrogate": (LINE + b'{"prompt": "\\ud800", "answer": "2"}', "data.jsonl, line 2: "),
    "no answer": (LINE + b'{"question": "one?"}', "data.jsonl, line 2: the field 'answer' is missing"),
    "no question": (LINE + b'{"answer": "2"}', "data.jsonl, line 2: the field 'question' is missing"),
    "question 3": (LINE + b'{"question": 3, "answer": "2"}', "data.jsonl, line 2: "),
    "no template": (b'{"prompt": [{"role": "user", "content": "x"}], "answer": "2"}', "data.jsonl, line 1: "),
    **{f"answer {x.decode()}": (b'{"prompt": "one?", "answer": %s}' % x, ANSWER) for x in WRONG_ANSWERS},
    **{f"prompt {x.decode()}": (b'{"prompt": %s, "answer": "2"}' % x, TYPES) for x in WRONG_PROMPTS},
}






# Any JSON, often with the fields of problems, or any bytes.
words = st.sampled_from(["question", "prompt", "answer", "role", "content", "user", "1", "a #### 2"])
words = words | st.text(st.characters(exclude_categories=[]), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
values = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(words, x, max_size=3), max_leaves=6)
prompts = words | st.lists(st.fixed_dictionaries({"role": words, "content": words}) | values, max_size=3)
records = st.fixed_dictionaries({"answer": words | values}, optional={"question": prompts, "prompt": prompts | values})
good_lines = st.text(st.characters(codec="utf-8"), max_size=8).map(
    lambda text: json.dumps({"prompt": text, "answer": "2"}, ensure_ascii=False).encode()
)
lines = good_lines | st.binary(max_size=20) | (records | values).map(lambda value: json.dumps(value).encode())
contents = st.builds(lambda good, other: b"\n".join([*good, *other]), st.lists(good_lines), st.lists(lines, max_size=1))




# ----- Prompts and completions -----

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
WRITTEN = "<s><|im_start|>system be brief<|im_end|><|im_start|>user hi<|im_end|><|im_start|>assistant "






def test_prompts_are_padded_on_the_left():
    """And masked by length, so that an id of the padding may stand in a prompt."""
    ids, mask = grpo.pad_prompts([[5, 6, 7], [0], [8, 9]], CPU)
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]
    assert ids[mask].tolist() == [5, 6, 7, 0, 8, 9]


def test_decoding_keeps_to_the_mask_and_leaves_the_end_token_out():
    """A chat model ends with a token that its tokenizer does not mark as special: every reward saw it as text."""
    tokenizer = make_tokenizer()
    a, b, end, other_end = *tokenizer("ab;", add_special_tokens=False).input_ids, tokenizer.eos_token_id
    ids = torch.tensor([[a, b, a, end, b], [a, b, a, a, b], [end, a, b, a, b], [a, b, other_end, b, b]])
    mask = torch.arange(5) < torch.tensor([[4], [5], [1], [3]])
    assert grpo.decode(tokenizer, ids, mask, torch.tensor([end, other_end])) == ["aba", "abaab", "", "ab"]




LONGROPE = dict(rope_type="longrope", original_max_position_embeddings=128, short_factor=[1.0], long_factor=[4.0])
CONTEXTS = {
    "positions": dict(max_position_embeddings=128),
    # Phi-3 scales all positions anew once a text is longer than its first context: sampled and scored differed.
    "rescaled positions": dict(max_position_embeddings=512, rope_parameters=LONGROPE),
    "of some layers": dict(max_position_embeddings=512, rope_parameters=dict(full_attention=LONGROPE)),
}




# ----- What is held out -----


def load_prompts(*prompts: str, **args) -> list[list[str]]:
    """The prompts of the training problems and of the held-out ones, of a file of these."""
    write_lines("data.jsonl", *({"prompt": prompt, "answer": "1"} for prompt in prompts))
    tokenizer, _, *parts = load(num_prompts=1, **args)
    return [[tokenizer.decode(ids).removeprefix("<s>") for ids, _ in part] for part in parts]








@given(st.integers(5, 40), st.integers(1, 5), st.integers(0, 5))
def test_every_epoch_visits_its_problems_once_in_a_new_order(size, num_prompts, seed):
    problems, per_epoch = list(range(size)), size // num_prompts
    epochs = [
        [grpo.next_problems(problems, epoch * per_epoch + i, num_prompts, seed) for i in range(per_epoch)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        visited = list(itertools.chain(*epoch))
        assert len(set(visited)) == len(visited) == per_epoch * num_prompts
    assert size < 12 or epochs[0] != epochs[1]


# ----- Rewards -----




@given(st.text(max_size=60), st.integers(-(10**6), 10**6))
def test_the_reward_is_0_or_1_whatever_the_model_writes(text, answer):
    problem = {"answer": str(answer)}
    assert grpo.reward(text, problem) in (0.0, 1.0)
    assert grpo.reward(f"{text}#{answer}", problem) == 1.0


# ----- Models from disk -----


def write_template(text: str) -> None:
    Path("model/chat_template.jinja").write_text(text)


def cut_weights() -> None:
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])


def make_images_and_text() -> None:
    """Of a model of images and text, the language model alone was saved, under a type that nothing loads."""
    make_folder(Path())
    config = CONFIG_MAPPING["mllama"](**sweep_families.tiny(CONFIG_MAPPING["mllama"], {}))
    AutoModelForImageTextToText.from_config(config).save_pretrained("model")


NO_MODEL = "--model model is neither a model folder nor a reachable hub id: "
BAD_WEIGHTS = "--model model cannot be loaded: "
LACKING = f"{BAD_WEIGHTS}it has no weights, or none of the right shape, for model.layers."
BAD_MODELS = {
    "no config": (lambda: Path("model/config.json").unlink(), NO_MODEL),
    "half a config": (lambda: Path("model/config.json").write_text('{"model_type": "lla'), NO_MODEL),
    "a list as config": (lambda: Path("model/config.json").write_text("[]"), NO_MODEL),
    "unknown family": (lambda: change_json("model/config.json", model_type="nothing_of_the_kind"), NO_MODEL),
    "wrong type": (lambda: change_json("model/config.json", hidden_size="many"), NO_MODEL),
    "no tokenizer": (lambda: [path.unlink() for path in Path("model").glob("tokenizer*")], NO_MODEL),
    "half a tokenizer": (lambda: Path("model/tokenizer.json").write_text("{"), NO_MODEL),
    "end in words": (lambda: change_json("model/generation_config.json", eos_token_id="end"), NO_MODEL),
    "images": (lambda: Path("model/config.json").write_text('{"model_type": "vit"}'), "--model model"),
    "half a template": (lambda: write_template("{% for"), "data.jsonl, line 1: "),
    "a template that adds": (lambda: write_template("{{ messages[0]['content'] + 1 }}"), "data.jsonl, line 1: "),
    "a template that refuses": (lambda: write_template("{{ raise_exception('user\nfirst') }}"), "line 1: user first"),
    "a template of nothing": (lambda: write_template("{# #}"), "data.jsonl, line 1: it has 0 tokens"),
    "fewer ids": (lambda: change_json("model/config.json", vocab_size=99), "line 1: the tokenizer has token "),
    "no weights": (lambda: Path("model/model.safetensors").unlink(), BAD_WEIGHTS),
    "half of them": (cut_weights, BAD_WEIGHTS),
    "a layer more": (lambda: change_json("model/config.json", num_hidden_layers=3), f"{LACKING}2."),
    "another shape": (lambda: change_json("model/config.json", intermediate_size=40), f"{LACKING}0.mlp.down_proj"),
    "a part": (make_images_and_text, f"{BAD_WEIGHTS}it is a part of another model"),
}




def test_quantised_weights_are_refused(monkeypatch):
    model = make_model("llama", torch.bfloat16)  # as if it were
    found = model, {"missing_keys": [], "mismatched_keys": []}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: found)
    with pytest.raises(grpo.UserError, match="its weights are quantised; to train, they must be floating-point"):
        grpo.load_policy("model", CPU)






# ----- What is printed -----




# ----- The tiny model and its problems -----




def test_the_tiny_model_is_what_its_script_makes_and_reads_and_writes_every_demonstration():
    problems, rng = pretrain.all_problems(), random.Random(0)
    texts = [prompt + pretrain.demonstration(prompt, answer, rng) for prompt, answer in problems]
    made = pretrain.make_tokenizer(texts)
    tokenizer = AutoTokenizer.from_pretrained(grpo.TINY)
    assert tokenizer.get_vocab() == made.get_vocab()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (made.eos_token_id, made.pad_token_id)
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in texts[:100]] == texts[:100]
    model = pretrain.make_model(len(made), made.eos_token_id)
    shipped = AutoModelForCausalLM.from_pretrained(grpo.TINY)
    made_config, config = model.config.to_dict(), shipped.config.to_dict()
    changed = {name for name in made_config | config if made_config.get(name) != config.get(name)}
    assert changed <= {"architectures", "dtype", "transformers_version", "_name_or_path"}  # saving adds these
