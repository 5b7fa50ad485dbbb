"""Job of the fork server: pre-training that tells how many micro-batches were fetched ahead."""

from collections.abc import Callable
from typing import Any

from megatron_pd import pretrain
from megatron_pd.data.prefetch import Prefetched


def main() -> int:
    taken = 0
    original: Callable[[Prefetched], Any] = Prefetched.__next__

    def counting(self: Prefetched) -> Any:
        nonlocal taken
        taken += 1
        return original(self)

    Prefetched.__next__ = counting
    status = pretrain.main()
    print(f"fetched ahead: {taken} micro-batches")
    return status
