# SPDX-License-Identifier: MIT
"""What a user gives to the scripts, good and bad: a model that reads any text, problems, flags; and what `main` says.
"""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import make_model

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% if must_think %}<think>{% endif %}{% endif %}"
)


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A real tokenizer over bytes that puts a BOS in front, as Llama's does. <think> is a token, but no special one."""
    specials = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(specials + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], chat_template=chat_template,
    )  # fmt: skip


def make_byte_folder(folder: Path) -> None:
    """model/ and data.jsonl as in `make_folder`, but the model reads any text, of up to 128 bytes with its answer."""
    model = make_model("llama", torch.float32, vocab_size=260, max_position_embeddings=128, eos_token_id=2)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_lines(folder / "data.jsonl", *({"question": f"one and {i}?", "answer": "2"} for i in range(8)))


def write_lines(path: str | Path, *problems: dict) -> None:
    Path(path).write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def change_json(path: str | Path, **changes: object) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def refusal(script, args: object) -> str:
    """The sentence that the program ends with, for which Python's exit code is 1."""
    with pytest.raises(SystemExit) as ended:
        script.main(args)
    sentence = ended.value.code
    assert sentence.startswith(f"{script.__name__}.py: ")
    assert len(sentence.splitlines()) == 1
    return sentence
