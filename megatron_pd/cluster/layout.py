"""Which ranks read teacher rows, as `data.batch` decides it: the first tensor-parallel rank of the
last pipeline stage, in every data- and context-parallel group."""

from typing import Any

from megatron.core.parallel_state import RankGenerator

__all__ = ["readers_per_node", "reading_ranks"]


def reading_ranks(args: Any) -> list[int]:
    """Ranks that read the logit store, ascending, of Megatron's validated arguments."""
    generator = RankGenerator(
        tp=args.tensor_model_parallel_size,
        ep=1,
        dp=args.data_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
    )
    first_of_tp = {ranks[0] for ranks in generator.get_ranks("tp")}
    last_stage = {ranks[-1] for ranks in generator.get_ranks("pp")}
    return sorted(first_of_tp & last_stage)


def readers_per_node(ranks: list[int], processes_per_node: int) -> int:
    """The most reading ranks on one node."""
    nodes = [rank // processes_per_node for rank in ranks]
    return max(map(nodes.count, set(nodes)))
