# SPDX-License-Identifier: MIT
"""Problems, prompts, rewards and models: real formats, one BOS, no problem skipped or trained on that is held out; and
what cannot be read or trained is said in one sentence, before what takes longer is loaded.
"""

import itertools
import json
import random
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import grpo
import ppo
from helpers.inputs import CHATML, change_json, main, make_byte_folder, make_tokenizer, write_lines
from helpers.runs import TWINS, arguments, make_folder, weights
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


def test_json_lines_of_every_kind_are_read():
    lines = [
        {"question": "Two and two?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
        {"prompt": "Two and three:", "answer": "5"},
        {"prompt": [{"role": "user", "content": "Six?"}], "answer": "#### 6"},
        {"prompt": "Seven:", "question": "not this", "answer": "7", "more": None},
    ]
    Path("data.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    tokenizer = make_tokenizer(CHATML)
    ids, problems = zip(*grpo.read_problems("data.jsonl", tokenizer, [], len(tokenizer), 100), strict=True)
    asked = ["Two and two?" + grpo.INSTRUCTION, "Two and three:", "Six?", "Seven:"]
    assert [*ids] == [grpo.encode_prompt(tokenizer, text, []) for text in asked]
    assert [*problems] == lines  # whatever they hold, a reward sees it
    assert [grpo.final_number("#" + problem["answer"]) for problem in problems] == [Decimal(i) for i in (4, 5, 6, 7)]


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


@TWINS
@pytest.mark.parametrize(("content", "says"), named(BAD_LINES))
@pytest.mark.usefixtures("no_weights_are_loaded")
def test_lines_that_are_no_problems_are_named(script, content, says, capsys):
    Path("data.jsonl").write_bytes(content)
    assert_refused(says, script, capsys)


@TWINS
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (dict(data="nothing.jsonl"), "cannot read nothing.jsonl: [Errno 2]"),
        (dict(data="\x1b[2J.jsonl"), r"cannot read \x1b[2J.jsonl: [Errno 2]"),  # which would clear the screen
        (dict(data="model"), "cannot read model: [Errno 21]"),
        (dict(eval_data="nothing.jsonl"), "cannot read nothing.jsonl"),
        (dict(num_prompts=8), "--num-prompts 8 is more than the 7 training problems, 1 being held out"),
        (dict(num_prompts=10, eval_data="data.jsonl"), "--num-prompts 10 is more than the 8 training"),
        (dict(max_new_tokens=500), "data.jsonl, line 1: it has 74 tokens; 1 to -372 fit beside --max-new-tokens"),
        (dict(model="nowhere"), "--model nowhere is neither a model folder nor a reachable hub id"),
        (dict(model="nobody/nothing"), "--model nobody/nothing is neither a model folder nor a reachable hub id"),
        (dict(model="../.."), "--model ../.. is neither a model folder"),
        (dict(model="data.jsonl"), "--model data.jsonl is neither a model folder"),
        (dict(model=""), "--model is neither a model folder"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_weights_are_loaded")
def test_files_and_models_that_cannot_be_are_refused(script, args, says, capsys):
    assert_refused(says, script, capsys, **args)


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


@pytest.mark.parametrize("tokenizer", [make_tokenizer(), make_tokenizer(CHATML)], ids=["no template", "template"])
@given(content=contents | st.binary(), eval_content=st.none() | contents)
def test_data_are_problems_or_one_sentence(tokenizer, content, eval_content):
    config = LlamaConfig(max_position_embeddings=128, vocab_size=259)
    Path("data.jsonl").write_bytes(content)
    Path("eval.jsonl").write_bytes(eval_content or b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", lambda model, **options: tokenizer)
        patch.setattr(grpo.AutoConfig, "from_pretrained", lambda model, **options: config)
        try:
            _, _, problems, held_out = load(num_prompts=1, eval_data=None if eval_content is None else "eval.jsonl")
        except grpo.UserError:
            return
    number = len([line for line in (content + b"\n" + (eval_content or b"")).split(b"\n") if line.strip()])
    alone = eval_content is None and len({tuple(ids) for ids, _ in problems}) == 1  # is held out as well
    assert len(problems) + len(held_out) in ((number, number + 1) if alone else (number,))
    for ids, problem in problems + held_out:
        assert 0 < len(ids) <= 122
        assert grpo.final_number("#" + problem["answer"]) is not None


# ----- Prompts and completions -----

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
WRITTEN = "<s><|im_start|>system be brief<|im_end|><|im_start|>user hi<|im_end|><|im_start|>assistant "


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        (None, "hi", "<s>hi"),
        (CHATML, "hi", "<s><|im_start|>user hi<|im_end|><|im_start|>assistant "),
        (CHATML, CHAT, WRITTEN),
        (CHATML, [*CHAT, {"role": "assistant", "content": "The answer"}], WRITTEN + "The answer"),
    ],
)
def test_a_prompt_has_one_bos_and_asks_for_the_assistant_or_continues_it(template, prompt, expected):
    tokenizer = make_tokenizer(template)
    ids = grpo.encode_prompt(tokenizer, prompt, [])
    assert tokenizer.decode(ids) == expected
    assert ids.count(0) == 1


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}<|im_end|>"], ids=["text", "chat"])
def test_a_prompt_is_not_closed_by_the_end_token_unless_a_template_says_so(template):
    """The tokenizer appends its EOS to every text, as Llama's does with add_eos_token: prompts were closed answers."""
    tokenizer = make_tokenizer(template)
    appends = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    tokenizer.backend_tokenizer.post_processor = appends
    tokenizer.save_pretrained("model")
    assert AutoTokenizer.from_pretrained("model")("1+1=").input_ids[-1] == 2
    _, _, problems, held_out = load()
    assert {ids[-1] == 2 for ids, _ in problems + held_out} == {template is not None}


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


@pytest.mark.parametrize(
    ("of_config", "of_generation", "of_tokenizer", "expected"),
    [
        (1, [5, 3], "<|im_end|>", [1, 2, 3, 5]),
        (1, 4, "<|im_end|>", [1, 2, 4]),
        (1, None, None, [1]),
        (259, 999, "<|im_end|>", [2]),  # ids that the model cannot produce: every completion would be truncated
        (-1, -1, "<|im_end|>", [2]),
        (259, -1, None, []),
        (None, None, "<|not in the model|>", []),
        (None, None, None, []),
    ],
)
def test_every_token_that_can_end_a_completion_is_found(of_config, of_generation, of_tokenizer, expected):
    change_json("model/config.json", eos_token_id=of_config)
    change_json("model/generation_config.json", eos_token_id=of_generation)
    change_json("model/tokenizer_config.json", eos_token=of_tokenizer)
    if expected:
        assert load()[1].tolist() == expected
    else:
        with pytest.raises(grpo.UserError, match="it has no EOS token, so its completions could never end"):
            load()


LONGROPE = dict(rope_type="longrope", original_max_position_embeddings=128, short_factor=[1.0], long_factor=[4.0])
CONTEXTS = {
    "positions": dict(max_position_embeddings=128),
    # Phi-3 scales all positions anew once a text is longer than its first context: sampled and scored differed.
    "rescaled positions": dict(max_position_embeddings=512, rope_parameters=LONGROPE),
    "of some layers": dict(max_position_embeddings=512, rope_parameters=dict(full_attention=LONGROPE)),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_just_fits_the_model_is_taken(context, monkeypatch):
    config = LlamaConfig(vocab_size=259, eos_token_id=2)
    vars(config).update(CONTEXTS[context])
    monkeypatch.setattr(grpo.AutoConfig, "from_pretrained", lambda model, **options: config)
    Path("model/generation_config.json").unlink()  # many models have none
    write_lines("x.jsonl", {"prompt": "x" * 123, "answer": "2"})
    args = dict(data="x.jsonl", eval_data="data.jsonl", num_prompts=1)
    ((ids, _),) = load(max_new_tokens=4, **args)[2]
    assert len(ids) == 124
    with pytest.raises(grpo.UserError, match=r"x.jsonl, line 1: it has 124 tokens; 1 to 123 fit"):
        load(max_new_tokens=5, **args)
    config.max_position_embeddings, config.rope_parameters = -1, None
    load(max_new_tokens=5000, **args)
    args |= dict(eval_data="x.jsonl")
    config.vocab_size = max(ids) + 1
    load(**args)
    config.vocab_size = max(ids)
    with pytest.raises(grpo.UserError, match=f"has token {max(ids)}, the model only {max(ids)} tokens"):
        load(**args)


# ----- What is held out -----


def load_prompts(*prompts: str, **args) -> list[list[str]]:
    """The prompts of the training problems and of the held-out ones, of a file of these."""
    write_lines("data.jsonl", *({"prompt": prompt, "answer": "1"} for prompt in prompts))
    tokenizer, _, *parts = load(num_prompts=1, **args)
    return [[tokenizer.decode(ids).removeprefix("<s>") for ids, _ in part] for part in parts]


@pytest.mark.parametrize(
    ("number", "copies", "expected"), [(2, 1, 1), (9, 1, 1), (40, 1, 5), (2600, 1, 256), (20, 9, 3)]
)
def test_a_tenth_of_the_prompts_at_random_is_held_out_always_the_same(number, copies, expected):
    """A file held every problem several times: those that were held out of it were trained on."""
    random.seed(number)
    prompts = [f"{a // 100:02}+{a % 100:02}=" for a in range(number)] * copies
    train, held_out = load_prompts(*prompts)
    assert sorted(train + held_out) == sorted(prompts)
    assert not {*train} & {*held_out}
    assert len(held_out) == copies * expected
    assert load_prompts(*prompts, seed=2) == [train, held_out]
    if number >= 40:  # not from one end
        assert held_out != sorted(held_out)
        assert sorted(held_out) not in (sorted(prompts)[:expected], sorted(prompts)[-expected:])


def test_held_out_data_are_a_file_of_their_own_and_what_is_trained_on_too_is_counted(capsys):
    """--eval-data was a copy of some of the training problems, and its reward was taken for generalisation."""
    for asked, repeated in (("abcx", "3 of 4 held-out problems"), ("x", ""), ("a", "1 of 1 held-out problems")):
        write_lines("held_out.jsonl", *({"prompt": prompt, "answer": "1"} for prompt in asked))
        assert load_prompts(*"abcdefgh", eval_data="held_out.jsonl") == [[*"abcdefgh"], [*asked]]
        said = capsys.readouterr().err
        assert repeated in said
        assert bool(repeated) == ("held-out" in said)
    assert load_prompts("a", "a") == [["a", "a"], ["a"]]  # there is nothing else


@TWINS
def test_held_out_problems_are_evaluated_and_not_trained_on_and_no_reward_sees_an_end_token(
    script, folder, capsys, monkeypatch
):
    make_folder(folder)
    end = AutoTokenizer.from_pretrained("model").convert_tokens_to_ids(";")
    change_json("model/generation_config.json", eos_token_id=end)
    prompts, texts = [], []

    def compute_rewards(completions: list[str], problems: list[dict]) -> list[float]:
        prompts.append({problem["prompt"] for problem in problems})
        texts.extend(completions)
        return [0.0] * len(completions)

    monkeypatch.setattr(script, "compute_rewards", compute_rewards)
    main(script, arguments(script, num_steps=8, max_new_tokens=12, eval_every=8), capsys)
    greedy, sampled, *trained, greedy_at_the_end, sampled_at_the_end = prompts
    assert greedy == sampled == greedy_at_the_end == sampled_at_the_end
    assert len(greedy) == 5
    assert len(set.union(*trained)) == 4 * 8
    assert not greedy & set.union(*trained)
    assert len({*texts}) > 20
    assert not [text for text in texts if ";" in text]


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


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (
            "18",
            ["so it is #### 18", "#### $18.00", "#### +18", "#### **18** dollars", "#### the well-known (18)."],
            # Not another number, not without a marker, of several markers the last, and no list of guesses.
            ["#### 17", "18", "", "#### ", "#### 18 #### 17", "#### 18 or 17", "#### 1 8", "#### 18a",
             "#### 9+9", "#### __import__('os').abort()", "#### 99**99**99"],
        ),
        ("9 + 9 = <<9+9=18>>18\n#### 18", ["#### 18"], ["#### 9"]),
        ("43", ["8+5=13;0+3+1=4#43"], ["8+5=13;0+3+1=4"]),
        ("1234", ["#### 1,234."], ["#### 12,34", "#### 1,23,4"]),  # thousands in threes
        ("12345678.5", ["#### 12,345,678.50"], ["#### 12,345,678"]),
        ("0.5", ["#### .5"], ["#### 5"]),
        ("50", ["#### 50%"], ["#### 5", "#### \N{ARABIC-INDIC DIGIT FIVE}0"]),
        ("3", ["#### 3"], ["#### -3", "#### - 3", "#### \N{MINUS SIGN}3"]),
        ("-3", ["#### -3", "#### \N{MINUS SIGN}3", "#### -$3", "#### $-3"], ["#### 3", "#### - 3"]),
        ("no number", [], ["", "#### no number"]),  # nothing is not nothing's answer
    ],
)  # fmt: skip
def test_the_reward_is_for_the_one_number_after_the_last_marker(answer, right, wrong):
    assert {text: grpo.reward(text, {"answer": answer}) for text in right} == dict.fromkeys(right, 1.0)
    assert {text: grpo.reward(text, {"answer": answer}) for text in wrong} == dict.fromkeys(wrong, 0.0)


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


@TWINS
@pytest.mark.parametrize(("change", "says"), named(BAD_MODELS))
def test_bad_models_are_refused_before_more_is_loaded(script, change, says, capsys, monkeypatch):
    change()
    if not says.startswith(BAD_WEIGHTS):
        monkeypatch.setattr(script, "load_policy", None)
    assert_refused(says, script, capsys)


def test_quantised_weights_are_refused(monkeypatch):
    model = make_model("llama", torch.bfloat16)  # as if it were
    found = model, {"missing_keys": [], "mismatched_keys": []}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: found)
    with pytest.raises(grpo.UserError, match="its weights are quantised; to train, they must be floating-point"):
        grpo.load_policy("model", CPU)


@pytest.mark.parametrize(
    ("script", "family", "dtype"),
    [
        # The base model of its text model is the language model itself: ppo.py took its logits for states.
        pytest.param(ppo, "llama4_text", "float32", id="ppo llama4_text"),
        # These mix dtypes, where a trial in float32 did not: a traceback in the first step.
        pytest.param(grpo, "dbrx", "bfloat16", id="dbrx"),
        pytest.param(grpo, "xglm", "bfloat16", id="xglm"),
    ],
)
def test_families_that_cannot_be_trained_are_refused(script, family, dtype, folder, capsys):
    make_folder(folder)
    sweep_families.make_model(family, 0.1, {}).save_pretrained("model")
    how = "" if dtype == "float32" else f" with --dtype {dtype}"
    assert_refused(f"--model model cannot be trained here{how}: ", script, capsys, dtype=dtype)


@TWINS
def test_what_a_config_says_that_forward_returns_changes_nothing(script, folder, capsys):
    """Mixtral's own config may ask for the logits of its router: it was refused for sizes that did not match."""
    make_folder(folder)
    sweep_families.make_model("mixtral", 0.1, {}).save_pretrained("model")
    main(script, arguments(script, num_steps=2, run_name="without"), capsys)
    options = "output_router_logits", "output_attentions", "output_hidden_states"
    change_json("model/config.json", return_dict=False, use_cache=False, **dict.fromkeys(options, True))
    main(script, arguments(script, num_steps=2), capsys)
    before, after = weights("runs/without/policy"), weights("runs/a/policy")
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ----- What is printed -----


@TWINS
def test_what_a_terminal_would_obey_is_printed_escaped_and_a_long_prompt_is_cut(script, capsys):
    """A prompt held an escape sequence, and every evaluation cleared the screen. The name of a file is no UTF-8. Of an
    evaluation with a long prompt, the kind and the reward were cut off."""
    prompt = "\x1b[2J\x07a\rb\x9bc\x7f\u202e" + "long " * 50
    change_json("model/config.json", max_position_embeddings=512)
    write_lines("\udcff.jsonl", *({"prompt": prompt + str(i), "answer": "1"} for i in range(8)))
    said = main(script, arguments(script, data="\udcff.jsonl", eval_every=1, num_steps=1), capsys)  # all printable
    shown = [line for line in said.splitlines() if "long" in line]
    assert all(len(line) < 200 for line in shown)
    assert [line.split(":")[0].strip() for line in shown] == ["greedy, reward 0.00", "sampled, reward 0.00"] * 2
    for line in Path("runs/a/completions.jsonl").read_text().splitlines():
        assert prompt in json.loads(line)["prompt"]


# ----- The tiny model and its problems -----


def test_the_tiny_problems_are_all_sums_once_and_some_are_held_out():
    _, _, train, held_out = grpo.load_problems(grpo.check_args(grpo.Args()), CPU)
    assert (len(train), len(held_out)) == (9488, 512)
    problems = [(problem["prompt"], problem["answer"]) for _, problem in train + held_out]
    assert dict(problems) == {f"{a:02}+{b:02}=": str(a + b) for a in range(100) for b in range(100)}
    assert problems == pretrain.all_problems()


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
