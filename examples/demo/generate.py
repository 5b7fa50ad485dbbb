"""What models write on: a line of Python by each, found by transformers alone.

    python examples/demo/generate.py OUTPUT.json FOLDER [FOLDER …]

OUTPUT.json gets folder name → text. Greedy, so it says the same each time.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "import os\nimport sys\n\nclass Reader:\n    def __init__(self,"
NEW_TOKENS = 24


@torch.no_grad()
def continued(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
    return tokenizer.decode(ids[tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    output, *folders = map(Path, sys.argv[1:])
    texts = {folder.name: continued(folder) for folder in folders}
    output.write_text(json.dumps({"prompt": PROMPT, "texts": texts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
