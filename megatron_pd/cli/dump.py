"""`megatron-pd dump`: a teacher's rows of a corpus."""

import sys

HELP = (
    "Run a teacher over a corpus and write its logit store: a Megatron checkpoint (takes "
    "Megatron's flags), or a Hugging Face model (--hf-model FOLDER, which has its own --help)."
)


def main() -> int:
    if any(argument.partition("=")[0] == "--hf-model" for argument in sys.argv[1:]):
        from megatron_pd.teacher.huggingface.command import main
    else:
        from megatron_pd.teacher.megatron import main
    return main()
