"""A dump of 61 shards by two replicas, of which the second takes ten times as long for a batch.

Each prints how many batches it ran. UNEVEN_SECONDS is the time of the first's batch.
"""

import os
import time

from megatron_pd.store.admin.merge import even_ranges
from megatron_pd.teacher import dump, megatron

SHARDS = 61


def main() -> int:
    seconds = float(os.environ.get("UNEVEN_SECONDS", "0.03"))
    run, batches = megatron.MegatronTeacher.run, 0

    def paced(teacher, batch, config):
        nonlocal batches
        batches += 1
        time.sleep(seconds * (1, 10)[teacher.replica])
        return run(teacher, batch, config)

    megatron.MegatronTeacher.run = paced
    dump.shards_of = lambda lengths: even_ranges(lengths, SHARDS)
    status = megatron.main()
    print(f"replica of rank {os.environ['RANK']}: {batches} batches")
    return status
