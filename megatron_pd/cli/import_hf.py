"""`megatron-pd import-hf`: a Hugging Face folder → a Megatron checkpoint."""

import argparse

HELP = (
    "Turn a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3, GLM-4) into a checkpoint for "
    "Megatron's --load, whatever the parallel layout. Needs memory for one layer's tensor or the "
    "embeddings, and no network."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="with config.json and safetensors")
    parser.add_argument("--save", required=True, help="folder of the new checkpoint")


def run(args: argparse.Namespace) -> int:
    import warnings
    from pathlib import Path

    with warnings.catch_warnings():  # of Megatron's, about what speeds GPUs up
        warnings.simplefilter("ignore", UserWarning)
        from megatron_pd.hf.import_hf import import_hf

    made = import_hf(Path(args.folder), Path(args.save))
    print(
        f"{args.save}: {made.config.architecture.class_name}, {made.config.layers} layers, "
        f"{made.parameters:,} parameters, {str(made.dtype).removeprefix('torch.')}"
    )
    print(f"a teacher's rows:  megatron-pd dump --load {args.save} --data-path PREFIX")
    tokenizer = (
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {made.tokenizer}"
        if made.tokenizer
        else "--tokenizer-type … --tokenizer-model … (the folder has none)"
    )
    print(
        f"training goes on:  python -m megatron_pd.pretrain --load {args.save} "
        f"--use-checkpoint-args {tokenizer} …"
    )
    return 0
