"""What it costs to turn a teacher's logits into rows, beside the forward pass that gives them.

    python tools/benchmarks/bench_capture.py           # 12 layers, hidden 1024, V = 131,072
    python tools/benchmarks/bench_capture.py --quick

A Llama with random weights (transformers), a batch of random tokens, no gradients; then what a
dump does with the logits: top-p 0.95, top-k 50, the label's log-prob and the log-sum-exp. Random
weights give flat distributions, so every row has 50 entries. With --dump-statistics the entropy
and the standard deviation of the whole distribution come on top.
A turn is a forward pass and the two captures of its logits; figures are medians over the turns.
"""

import argparse
from typing import Any

import torch
from common import (
    Clock,
    Report,
    alternate,
    command_line,
    describe_machine,
    markdown_table,
    parse,
    parser,
    spreads,
)
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_pd.teacher.capture import capture_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    arguments = parser(__doc__, repeats=7, device="cpu")
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--hidden-size", type=int, default=1024)
    arguments.add_argument("--vocab-size", type=int, default=131_072)
    arguments.add_argument("--batch-size", type=int, default=2)
    arguments.add_argument("--seq-length", type=int, default=512)
    arguments.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    quick = dict(layers=2, hidden_size=128, vocab_size=8000, seq_length=64, repeats=2)
    options = parse(arguments, quick)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report()
    report.line("# Capture beside the teacher's forward pass\n")
    report.line(f"    {command_line()}\n")
    machine = describe_machine(options.device)
    report.line(", ".join(f"{name} {value}" for name, value in machine.items() if name != "note"))
    report.line("Method: see the docstring of `tools/benchmarks/bench_capture.py`.\n")
    report.line(
        f"{options.layers} layers, hidden size {options.hidden_size}, V = {options.vocab_size:,}, "
        f"{options.batch_size} x {options.seq_length} tokens; medians.\n"
    )
    figures = {name: measured(options, DTYPES[name]) for name in options.dtypes}
    columns = ("forward", "capture", "with statistics")
    rows = [
        [
            dtype,
            f"{found['forward'].median:.0f}",
            *(
                f"{found[name].median:.0f} ({found[name].median / found['forward'].median:.1%})"
                for name in columns[1:]
            ),
        ]
        for dtype, found in figures.items()
    ]
    for line in markdown_table(["", *(f"{name}, ms" for name in columns)], rows):
        report.line(line)
    report.save(
        options, {"machine": machine, "ms": {n: spreads(found) for n, found in figures.items()}}
    )


@torch.no_grad()
def measured(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds of a forward pass, of a capture, and of one with statistics."""
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 27 // 8,
        num_attention_heads=16,
        vocab_size=options.vocab_size,
    )
    model = LlamaForCausalLM(config).to(options.device, dtype).eval()
    shape = options.batch_size, options.seq_length + 1
    tokens = torch.randint(options.vocab_size, shape, device=options.device)
    clock = Clock(options.device)

    def turn() -> dict[str, float]:
        times = [clock()]
        logits = model(tokens[:, :-1], use_cache=False).logits
        times.append(clock())
        for statistics in (False, True):
            capture_rows(
                logits,
                tokens[:, 1:],
                top_p=0.95,
                top_k=50,
                vocab_size=options.vocab_size,
                statistics=statistics,
            )
            times.append(clock())
        names = ("forward", "capture", "with statistics")
        return {name: times[i + 1] - times[i] for i, name in enumerate(names)}

    turn()
    return alternate({"": turn}, options.repeats)[""]


if __name__ == "__main__":
    main()
