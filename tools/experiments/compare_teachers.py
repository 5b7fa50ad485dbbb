"""One teacher through transformers and through Megatron: how far apart its stored rows are.

    make demo && .venv/bin/python tools/experiments/compare_teachers.py

Dumps SmolLM2's rows of ten held-out documents of the demo from its Hugging Face folder and from the
checkpoint that was imported from it, both in float32, and prints the largest differences, and the
perplexity that follows from the stored label log-probs beside what transformers says of the same
tokens: five minutes on two cores.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.store import LogitStore, TeacherRows

DOCUMENTS = 10
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("build/demo"), help="folder of a demo")
    demo = parser.parse_args().demo
    model = str(demo / "smollm2")
    with tempfile.TemporaryDirectory() as scratch:
        corpus = f"{scratch}/corpus"
        documents = (demo / "seed-1" / "heldout.jsonl").read_text().splitlines()[:DOCUMENTS]
        Path(f"{corpus}.jsonl").write_text("\n".join(documents))
        tokenizer = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model)
        run("preprocess", "--input", f"{corpus}.jsonl", "--output-prefix", corpus, *tokenizer)
        sources = {
            "transformers": ("--hf-model", model, "--dtype", "float32"),
            "megatron": ("--load", str(demo / "seed-1" / "checkpoints" / "teacher")),
        }
        for name, source in sources.items():
            rows = ("--dump-codec", "exact", "--dump-statistics", "--seq-length", str(WINDOW))
            run("dump", *source, "--data-path", corpus, "--dump-store", f"{scratch}/{name}", *rows)
        stores = [LogitStore(f"{scratch}/{name}") for name in sources]
        report(model, MegatronCorpus(corpus), *stores)


def run(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "megatron_pd.cli", *command], check=True)


def report(model: str, corpus: MegatronCorpus, a: LogitStore, b: LogitStore) -> None:
    """Print how two stores of a corpus differ, and both perplexities beside the model's own."""
    pairs = [(a.read(number), b.read(number)) for number in range(a.num_documents)]
    worst = {"log-probs of stored entries": max(entry_difference(*pair) for pair in pairs)}
    for name in ("label_logprob", "entropy", "std"):
        worst[name] = max(
            float(np.nanmax(abs(x.statistics[name] - y.statistics[name]))) for x, y in pairs
        )
    for name, difference in worst.items():
        print(f"largest difference of {name}: {difference:.1e}")
    own = -own_logprobs(model, [corpus.tokens(number) for number in range(len(corpus))])
    print(
        f"{a.num_rows} rows; perplexity of the {len(own)} tokens of every document's first window"
    )
    print(f"  transformers' own logits         {own.mean().exp():.6f}")
    for name, column in (("transformers", 0), ("megatron", 1)):
        labels = [pair[column].statistics["label_logprob"][: WINDOW - 1] for pair in pairs]
        found = -torch.from_numpy(np.concatenate([x[~np.isnan(x)] for x in labels])).double()
        print(f"  stored label log-probs, {name:<12} {found.mean().exp():.6f}")


def entry_difference(a: TeacherRows, b: TeacherRows) -> float:
    """Largest difference of the log-probs of tokens that both rows of a position have."""
    same = (a.ids[:, :, None] == b.ids[:, None, :]) & (a.ids[:, :, None] >= 0)
    return float(abs(a.logprobs[:, :, None] - b.logprobs[:, None, :])[same].max())


@torch.no_grad()
def own_logprobs(folder: str, documents: list[np.ndarray]) -> torch.Tensor:
    """Log-probs, float64, of the tokens of all first windows, each after those before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for tokens in documents:
        ids = torch.from_numpy(tokens[:WINDOW].astype(np.int64))
        logits = model(ids[None]).logits[0, :-1].double()
        found.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    return torch.cat(found)


if __name__ == "__main__":
    main()
