"""`megatron-pd dump`: a Megatron teacher's rows of a corpus."""

HELP = "Run a Megatron teacher over a corpus and write its logit store (takes Megatron's flags)."


def main() -> int:
    from megatron_pd.teacher.megatron import main

    return main()
