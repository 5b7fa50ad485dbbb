"""Job of the fork server: Megatron's own validation of a launch script's flags on 64 ranks."""

import json
import os

from megatron.training.arguments import parse_and_validate_args

from megatron_pd.megatron.arguments import add_pd_arguments


def main() -> int:
    os.environ["WORLD_SIZE"] = "64"
    # Without the CPU's defaults: the flags are meant for GPUs.
    args = parse_and_validate_args(add_pd_arguments)
    print(json.dumps({"data_parallel_size": args.data_parallel_size}))
    return 0
