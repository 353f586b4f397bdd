# SPDX-License-Identifier: MIT
"""How the tiny model in this folder was made: a Llama of 0.2 M parameters that reads characters.

    python tests/tiny/pretrain.py FOLDER      # half a minute on two cores

It writes an ordinary model folder (config, weights, tokenizer) and train.jsonl and test.jsonl: all 10,000 sums of two
numbers below 100, of which 512 are held out. The model is pretrained on demonstrations: 4 in 10 add column by column
and are right, 6 in 10 answer at once, and 7 in 10 of those are wrong. It can reason, but its most probable answer is a
guess: that is what reinforcement learning then changes. The weights differ in the last bits from machine to machine.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS, BATCH_SIZE, LEARNING_RATE, HELD_OUT = 500, 128, 4e-3, 512


def all_problems() -> list[tuple[str, str]]:
    """(prompt, answer) of all sums of two numbers below 100, in a fixed random order."""
    problems = [(f"{a:02}+{b:02}=", str(a + b)) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(problems)
    return problems


def demonstration(prompt: str, answer: str, rng: random.Random) -> str:
    """A completion to imitate: column by column as in 38+57=8+7=15;3+5+1=9#95, or a guess as in 38+57=#95."""
    if rng.random() < 0.6:
        return f"#{answer if rng.random() < 0.3 else rng.randrange(199)}"
    (a, b), (c, d) = prompt[0:2], prompt[3:5]
    units = int(b) + int(d)
    carry = "+1" if units > 9 else ""
    return f"{b}+{d}={units};{a}+{c}{carry}={int(a) + int(c) + units // 10}#{answer}"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token per character, and an end token."""
    characters = sorted({character for text in texts for character in text})
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*characters, "<end>"])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_model(vocab_size: int, end: int) -> LlamaForCausalLM:
    """Larger initial weights and faster rotations than a large model's, so that it learns short texts quickly."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 20.0}, initializer_range=0.1,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def main(folder: Path) -> None:
    problems, rng = all_problems(), random.Random(0)
    drawn = rng.choices(problems[:-HELD_OUT], k=STEPS * BATCH_SIZE)
    texts = [(prompt, demonstration(prompt, answer, rng)) for prompt, answer in drawn]
    tokenizer = make_tokenizer([prompt + completion for prompt, completion in texts])
    end = tokenizer.eos_token_id
    model = make_model(len(tokenizer), end)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.15)
    for step in range(STEPS):
        batch = texts[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        batch = [(tokenizer(prompt).input_ids, [*tokenizer(completion).input_ids, end]) for prompt, completion in batch]
        ids = [torch.tensor(prompt + completion) for prompt, completion in batch]
        labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in batch]  # no prompt
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = model(pad_sequence(ids, batch_first=True, padding_value=end), labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, part in (("train.jsonl", problems[:-HELD_OUT]), ("test.jsonl", problems[-HELD_OUT:])):
        lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in part]
        (folder / name).write_text("".join(lines))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/tiny/pretrain.py FOLDER")
    main(Path(sys.argv[1]))
