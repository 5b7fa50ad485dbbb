"""Job of the fork server: pre-training in which the second rank is alone on a machine of its own.

    ORIGINAL REPLACEMENT <the arguments of megatron_pd.pretrain>

On that machine ORIGINAL, wherever an argument holds it, is REPLACEMENT.
"""

import os
import sys

from megatron_pd import pretrain


def main() -> int:
    original, replacement, *argv = sys.argv[1:]
    if os.environ["RANK"] == "1":
        os.environ["LOCAL_RANK"] = "0"
        argv = [argument.replace(original, replacement) for argument in argv]
    sys.argv[1:] = argv
    return pretrain.main()
