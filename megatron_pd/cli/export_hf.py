"""`megatron-pd export-hf`: a Megatron checkpoint → a Hugging Face folder."""

import argparse

HELP = (
    "Turn the last iteration of a Megatron checkpoint, of any parallel layout, into a Hugging Face "
    "folder: config.json, safetensors, tokenizer and generation config. Which architecture it is "
    "is seen from the checkpoint's arguments. Needs memory for one layer's tensor or the "
    "embeddings, and no network."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", required=True, help="the checkpoint's folder")
    parser.add_argument("--output", required=True, help="folder of the new model")
    parser.add_argument(
        "--tokenizer",
        help="a Hugging Face folder or a sentencepiece model; default: the one that the "
        "checkpoint names",
    )


def run(args: argparse.Namespace) -> int:
    import warnings
    from pathlib import Path

    with warnings.catch_warnings():  # of Megatron's, about what speeds GPUs up
        warnings.simplefilter("ignore", UserWarning)
        from megatron_pd.hf.export_hf import export_hf

    tokenizer = None if args.tokenizer is None else Path(args.tokenizer)
    made = export_hf(Path(args.load), Path(args.output), tokenizer)
    for note in made.companions.notes:
        print(note)
    print(
        f"{args.output}: {made.config.architecture.class_name}, {made.config.layers} layers, "
        f"{made.parameters:,} parameters, {str(made.dtype).removeprefix('torch.')}, "
        f"{made.config.values['vocab_size']:,} tokens"
    )
    return 0
