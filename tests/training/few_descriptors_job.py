"""Job of the fork server: a command, then training, that may open 160 files at once.

few_descriptors_job verify STORE -- <flags of training>
"""

import resource
import sys

from megatron_pd import cli, pretrain

DESCRIPTORS = 160


def main() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
    end = sys.argv.index("--")
    name, training = sys.argv[0], sys.argv[end + 1 :]
    sys.argv = sys.argv[:end]
    if status := cli.main():
        return status
    sys.argv = [name, *training]
    return pretrain.main()
