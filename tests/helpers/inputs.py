# SPDX-License-Identifier: MIT
"""What a user gives to the scripts, good and bad: a model that reads any text, problems, flags; and what `main` says.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import make_model

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A real tokenizer over bytes that puts a BOS in front, as Llama's does."""
    specials = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(specials + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], chat_template=chat_template,
    )  # fmt: skip


def make_byte_folder(folder: Path) -> None:
    """model/ and data.jsonl as in `make_folder`, but the model reads any text, of up to 128 bytes with its answer."""
    model = make_model("llama", torch.float32, vocab_size=259, max_position_embeddings=128, eos_token_id=2)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_lines(folder / "data.jsonl", *({"question": f"one and {i}?", "answer": "2"} for i in range(8)))


def write_lines(path: str | Path, *problems: dict) -> None:
    Path(path).write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def change_json(path: str | Path, **changes: object) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def main(script, args: object, capsys, exit_code: int = 0) -> str:
    """All that the program says, or the one sentence that it ends with if its exit code is 2."""
    capsys.readouterr()
    assert script.main(args) == exit_code, capsys.readouterr().err
    said = capsys.readouterr().err
    assert all(x.isprintable() or x == "\n" for x in said), ascii(said)
    assert "Traceback" not in said
    sentences = [line for line in said.splitlines() if line.startswith(f"{script.__name__}.py: ")]
    assert len(sentences) == (exit_code == 2), said
    return "".join(sentences) or said
