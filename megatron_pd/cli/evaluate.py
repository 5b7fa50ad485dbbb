"""`megatron-pd evaluate`: loss and calibration of a checkpoint on a corpus."""

HELP = "Loss and calibration error of a checkpoint on a held-out corpus (takes Megatron's flags)."


def main() -> int:
    from megatron_pd.evaluate.loss import main

    return main()
