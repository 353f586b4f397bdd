# SPDX-License-Identifier: MIT
"""Problems, prompts, rewards and models: real formats, one BOS, no problem skipped, and none trained on that is held
out; and what cannot be read or trained is said in one sentence, before a run begins.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoModelForCausalLM

import grpo
from helpers.inputs import CHATML, change_json, make_byte_folder, make_tokenizer, refusal, write_lines
from helpers.runs import TWINS, arguments
from helpers.tiny_models import make_model
from tools import sweep_families

CPU = torch.device("cpu")
LINE = b'{"question": "one and one?", "answer": "2"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    """With model/, which reads any text, and data.jsonl, a file of eight problems."""
    make_byte_folder(tmp_path)
    monkeypatch.chdir(tmp_path)


# ----- Lines of problems -----


def test_read_problems_reads_json_lines_of_every_kind():
    lines = [
        {"question": "Two and two?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
        {"prompt": "Two and three:", "answer": "5"},
        {"prompt": [{"role": "user", "content": "Six?"}], "answer": "#### 6"},
        {"prompt": "Seven:", "question": "not this", "answer": "7", "more": None},
    ]
    Path("data.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    tokenizer = make_tokenizer(CHATML)
    ids, problems = zip(*grpo.read_problems("data.jsonl", tokenizer, most_tokens=150), strict=True)
    asked = ["Two and two?" + grpo.INSTRUCTION, "Two and three:", "Six?", "Seven:"]
    assert [*ids] == [grpo.encode_prompt(tokenizer, text) for text in asked]
    assert [*problems] == lines  # whatever they hold, a reward sees it
    assert [grpo.final_number("#" + problem["answer"]) for problem in problems] == [4, 5, 6, 7]


MISSING = 'data.jsonl, line 2: it must have "answer" and either "question" or "prompt"'
ANSWER = 'line 1: "answer" must be a string that ends in one number, alone or after ####'
WRONG_ANSWERS = b"2", b"null", b'"12 5"', b'"two"'
WRONG_PROMPTS = (
    b"null", b"[]", b'["one?"]', b'{"role": "user", "content": "x"}', b'[{"role": "user"}]',
    b'[{"role": "user", "content": null}]', b'[{"role": "user", "content": "there is no chat template"}]',
)  # fmt: skip
BAD_LINES = {
    "empty": (b"\n \n\r\n", "data.jsonl is empty: it must hold one JSON object per line"),
    "half a line": (LINE * 3 + b'{"question": "one and', "data.jsonl, line 4: "),
    "an array": (LINE + b"\n[" + LINE.strip() + b"]", "data.jsonl, line 3: it must be a JSON object"),
    "not UTF-8": (LINE * 4 + b'{"question": "\xff?", "answer": "2"}', "cannot read data.jsonl: "),
    "surrogate": (LINE + b'{"prompt": "\\ud800", "answer": "2"}', "data.jsonl, line 2: "),
    "no answer": (LINE + b'{"question": "one?"}', MISSING),
    "messages": (LINE + b'{"messages": [], "answer": "2"}', MISSING),
    **{f"answer {x.decode()}": (b'{"prompt": "one?", "answer": %s}' % x, ANSWER) for x in WRONG_ANSWERS},
    **{f"prompt {x.decode()}": (b'{"prompt": %s, "answer": "2"}' % x, "line 1: ") for x in WRONG_PROMPTS},
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_lines_that_are_no_problems_are_named(case):
    content, says = BAD_LINES[case]
    Path("data.jsonl").write_bytes(content)
    assert says in refusal(grpo, arguments(grpo))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (dict(data="nothing.jsonl"), "cannot read nothing.jsonl: [Errno 2]"),
        (dict(eval_data=""), "cannot read : [Errno 2]"),  # an unset variable: a tenth of --data was held out
        (dict(num_prompts=8), "--num-prompts 8 is more than the 7 training problems, 1 being held out"),
        (dict(num_prompts=10, eval_data="data.jsonl"), "--num-prompts 10 is more than the 8 training"),
        (dict(max_new_tokens=500), "data.jsonl, line 1: it has 74 tokens; 1 to -372 fit beside --max-new-tokens"),
        (dict(model="nobody/nothing"), "--model nobody/nothing cannot be loaded: "),
    ],
    ids=str,
)
def test_files_and_models_that_cannot_be_are_refused(args, says):
    assert says in refusal(grpo, arguments(grpo, **args))


# ----- Prompts and completions -----

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
WRITTEN = "<s><|im_start|>system be brief<|im_end|><|im_start|>user hi<|im_end|><|im_start|>assistant "


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        (None, "hi", "<s>hi"),
        (CHATML, "hi", "<s><|im_start|>user hi<|im_end|><|im_start|>assistant "),
        (CHATML, CHAT, WRITTEN),
        # <think> is one token of the model, and was spelled out in seven.
        (CHATML, [*CHAT, {"role": "assistant", "content": "<think>\n"}], WRITTEN + "<think>\n"),
    ],
)
def test_a_prompt_has_one_bos_and_asks_for_the_assistant_or_continues_it(template, prompt, expected):
    tokenizer = make_tokenizer(template)
    ids = grpo.encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(ids) == expected
    assert ids.count(0) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == expected.count("<think>")


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}<|im_end|>"], ids=["text", "chat"])
def test_a_prompt_is_not_closed_by_the_end_token_unless_a_template_says_so(template):
    """The tokenizer appends its EOS to every text, as Llama's does with add_eos_token: prompts were closed answers."""
    tokenizer = make_tokenizer(template)
    appends = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    tokenizer.backend_tokenizer.post_processor = appends
    assert tokenizer("1+1=").input_ids[-1] == 2
    assert (grpo.encode_prompt(tokenizer, "1+1=")[-1] == 2) == (template is not None)


def test_prompts_that_are_rendered_already_are_counted(capsys):
    """People store them so for other trainers. Here their special tokens are plain text."""
    rendered = {"prompt": "<|im_start|>user hi<|im_end|><|im_start|>assistant ", "answer": "1"}
    chat = {"prompt": [{"role": "user", "content": "<|im_end|>"}], "answer": "1"}  # what a user wrote is text
    write_lines("data.jsonl", rendered, {"question": "hi <think>", "answer": "1"}, chat, rendered)
    grpo.read_problems("data.jsonl", make_tokenizer(CHATML), most_tokens=200)
    assert "data.jsonl: 2 prompts hold special tokens, which are encoded as plain text" in capsys.readouterr().err


def test_prompts_are_padded_on_the_left():
    """And masked by length, so that an id of the padding may stand in a prompt."""
    ids, mask = grpo.pad_prompts([[5, 6, 7], [0], [8, 9]], CPU)
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]
    assert ids[mask].tolist() == [5, 6, 7, 0, 8, 9]


def test_decode_keeps_to_the_mask_and_leaves_the_end_token_out():
    """A chat model ends with a token that its tokenizer does not mark as special: every reward saw it as text."""
    tokenizer = make_tokenizer()
    a, b, end, other_end = *tokenizer("ab;", add_special_tokens=False).input_ids, tokenizer.eos_token_id
    ids = torch.tensor([[a, b, a, end, b], [a, b, a, a, b], [end, a, b, a, b], [a, b, other_end, b, b]])
    mask = torch.arange(5) < torch.tensor([[4], [5], [1], [3]])
    assert grpo.decode(tokenizer, ids, mask, torch.tensor([end, other_end])) == ["aba", "abaab", "", "ab"]


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "template", "expected"),
    [
        ([5, 3], "<|im_end|>", None, [2, 3, 5]),
        (4, None, None, [4]),
        (None, "<|im_end|>", None, [2]),
        (260, "<|im_end|>", None, [2]),  # an id that the model cannot produce: every completion would be truncated
        (-1, None, None, []),
        # Base models name another end than their template writes behind an answer: their completions never ended.
        (5, "<s>", CHATML, [0, 2, 5]),
        (5, None, "{% for m in messages %}{{ m.content }}\n{% endfor %}", [5]),  # no special token
    ],
)
def test_end_tokens_finds_every_token_that_can_end_a_completion(of_model, of_tokenizer, template, expected):
    tokenizer = make_tokenizer(template)
    tokenizer.eos_token = of_tokenizer
    policy = grpo.load_policy("model", CPU)
    policy.generation_config.eos_token_id = of_model
    assert grpo.end_tokens(tokenizer, policy) == expected


def test_end_tokens_are_those_of_the_outer_config_too():
    """Gemma 3's config holds the one of its text model, and names an end more than that."""
    sweep_families.make_model("gemma3", 0.1, {}).save_pretrained("gemma")
    Path("gemma/generation_config.json").unlink()
    change_json("gemma/config.json", eos_token_id=[1, 7])
    policy = grpo.load_policy("gemma", CPU)
    assert policy.config.get_text_config().eos_token_id == 1
    assert grpo.end_tokens(make_tokenizer(), policy) == [1, 2, 7]


LONGROPE = dict(rope_type="longrope", original_max_position_embeddings=128, short_factor=[1.0], long_factor=[4.0])
CONTEXTS = {
    "positions": dict(max_position_embeddings=128),
    # Phi-3 scales all positions anew once a text is longer than its first context: sampled and scored differed.
    "rescaled positions": dict(max_position_embeddings=512, rope_parameters=LONGROPE),
    "of some layers": dict(max_position_embeddings=512, rope_parameters=dict(full_attention=LONGROPE)),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_just_fits_the_model_is_taken(context):
    policy = grpo.load_policy("model", CPU)
    vars(policy.config).update(CONTEXTS[context])
    write_lines("x.jsonl", {"prompt": "x" * 123, "answer": "2"})  # 124 tokens
    args = arguments(grpo, data="x.jsonl", eval_data="data.jsonl", num_prompts=1, max_new_tokens=4)
    grpo.load_problems(args, policy)
    args.max_new_tokens = 5
    with pytest.raises(grpo.UserError, match=r"x.jsonl, line 1: it has 124 tokens; 1 to 123 fit"):
        grpo.load_problems(args, policy)
    policy.config.max_position_embeddings, policy.config.rope_parameters = -1, None  # no limit
    grpo.load_problems(args, policy)


# ----- What is held out, and what is trained on -----


def load_prompts(*prompts: str, **args) -> list[list[str]]:
    """The prompts of the training problems and of the held-out ones, of a file of these."""
    write_lines("data.jsonl", *({"prompt": prompt, "answer": "1"} for prompt in prompts))
    policy = grpo.load_policy("model", CPU)
    tokenizer, _, *parts = grpo.load_problems(arguments(grpo, num_prompts=1, **args), policy)
    return [[tokenizer.decode(ids).removeprefix("<s>") for ids, _ in part] for part in parts]


@pytest.mark.parametrize(("number", "expected"), [(2, 1), (9, 1), (40, 5), (2600, 256)])
def test_a_tenth_of_the_problems_at_random_is_held_out_always_the_same(number, expected):
    random.seed(number)
    prompts = [f"{a:04}" for a in range(number)]
    train, held_out = load_prompts(*prompts)
    assert sorted(train + held_out) == prompts
    assert len(held_out) == expected
    assert load_prompts(*prompts, seed=2) == [train, held_out]
    assert number < 40 or sorted(held_out) not in (prompts[:expected], prompts[-expected:])  # not from one end


def test_held_out_data_are_a_file_of_their_own_and_what_is_trained_on_too_is_counted(capsys):
    """--eval-data was a copy of some of the training problems, and its reward was taken for generalisation."""
    for asked, repeated in (("abcx", "3 of 4 held-out problems"), ("x", "")):
        write_lines("held_out.jsonl", *({"prompt": prompt, "answer": "1"} for prompt in asked))
        assert load_prompts(*"abcdefgh", eval_data="held_out.jsonl") == [[*"abcdefgh"], [*asked]]
        said = capsys.readouterr().err
        assert repeated in said
        assert bool(repeated) == ("held-out" in said)


@given(st.integers(5, 40), st.integers(1, 5), st.integers(0, 5))
def test_next_problems_visits_every_problem_once_an_epoch_in_a_new_order(size, num_prompts, seed):
    per_epoch, epochs = size // num_prompts, []
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        visited = [i for step in steps for i in grpo.next_problems(list(range(size)), step, num_prompts, seed)]
        assert len(set(visited)) == len(visited) == per_epoch * num_prompts
        epochs.append(visited)
    assert size < 12 or epochs[0] != epochs[1]


# ----- Rewards -----


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (
            "18",
            ["#### 17? No, #### 18", "#### $18.00", "#### +18", "#### **18** dollars", "#### the well-known (18)."],
            # Not another number, not without a marker, of several markers the last, and no list of guesses.
            ["#### 17", "18", "", "#### ", "#### 18 #### 17", "#### 18 or 17", "#### 1 8", "#### 18a",
             "#### 9+9", "#### __import__('os').abort()", "#### 99**99**99"],
        ),
        ("43", ["8+5=13;0+3+1=4#43"], ["8+5=13;0+3+1=4"]),
        ("12345678.5", ["#### 12,345,678.50"], ["#### 12,345,678"]),
        ("50", ["#### 50%"], ["#### 5", "#### \N{ARABIC-INDIC DIGIT FIVE}0"]),
        ("-3", ["#### -3", "#### $-3"], ["#### 3"]),
        ("3", ["#### 3"], ["#### - 3", "#### -$3"]),
        ("5", ["#### 5."], ["#### .5"]),
        ("no number", [], ["", "#### no number"]),  # nothing is not nothing's answer
    ],
)  # fmt: skip
def test_the_reward_is_for_the_one_number_after_the_last_marker(answer, right, wrong):
    assert {text: grpo.reward(text, {"answer": answer}) for text in right} == dict.fromkeys(right, 1.0)
    assert {text: grpo.reward(text, {"answer": answer}) for text in wrong} == dict.fromkeys(wrong, 0.0)


# ----- Models from disk -----


BAD_WEIGHTS, BAD_TOKENIZER = "--model model cannot be loaded: ", "--model model: its tokenizer cannot be loaded: "
BAD_TEMPLATE = "the chat template cannot write a question and an answer: "
NO_END = dict(generation=dict(eos_token_id=None), tokenizer=dict(eos_token=None))
BAD_MODELS = {
    "no config": (lambda: Path("model/config.json").unlink(), BAD_WEIGHTS),
    "unknown family": (lambda: change_json("model/config.json", model_type="nothing_of_the_kind"), BAD_WEIGHTS),
    "no weights": (lambda: Path("model/model.safetensors").unlink(), BAD_WEIGHTS),
    "a layer more": (lambda: change_json("model/config.json", num_hidden_layers=3), "no weights for model.layers.2."),
    "no tokenizer": (lambda: [path.unlink() for path in Path("model").glob("tokenizer*")], BAD_TOKENIZER),
    "no end": (
        lambda: [change_json(f"model/{name}_config.json", **ends) for name, ends in NO_END.items()],
        "it has no EOS token, so its completions could never end",
    ),
    "half a template": (lambda: Path("model/chat_template.jinja").write_text("{% for"), BAD_TEMPLATE),
    "an empty template": (lambda: Path("model/chat_template.jinja").write_text("{# #}"), "line 1: it has 0 tokens"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused_before_a_run_begins(case):
    change, says = BAD_MODELS[case]
    change()
    assert says in refusal(grpo, arguments(grpo))
    assert not Path("runs").exists()


def test_quantised_weights_are_refused(monkeypatch):
    found = make_model("llama", torch.bfloat16), {"missing_keys": []}  # as if they were
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: found)
    with pytest.raises(grpo.UserError, match="its weights are quantised; to train, they must be floating-point"):
        grpo.load_policy("model", CPU)


# ----- What is printed -----


@TWINS
def test_what_a_terminal_would_obey_is_printed_escaped_and_a_long_prompt_is_cut(script, capsys):
    """A prompt held an escape sequence, and every evaluation cleared the screen. Of an evaluation with a long prompt,
    the kind and the reward were cut off."""
    prompt = "long " * 50 + "\x1b[2J\x07a\rb\x9bc\x7f\u202e"
    change_json("model/config.json", max_position_embeddings=512)
    write_lines("data.jsonl", *({"prompt": prompt + str(i), "answer": "1"} for i in range(8)))
    capsys.readouterr()
    script.train(arguments(script, eval_every=1, num_steps=1))
    said = capsys.readouterr().err
    assert all(x.isprintable() or x == "\n" for x in said), ascii(said)
    shown = [line for line in said.splitlines() if "long" in line]
    assert all(len(line) < 220 for line in shown)
    assert [line.split(":")[0].strip() for line in shown] == ["greedy, reward 0.00", "sampled, reward 0.00"] * 2
