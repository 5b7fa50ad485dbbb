"""Job of the fork server: TEXT MODEL VOCABULARY CORPUS → a tokenizer and a corpus of the text."""

import sys

from megatron.training.config import TokenizerConfig

from megatron_pd.data.preprocess import preprocess
from megatron_pd.data.train_tokenizer import train_tokenizer


def main() -> int:
    text, model, vocab_size, corpus = sys.argv[1:]
    train_tokenizer([text], model, int(vocab_size))
    config = TokenizerConfig(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=model, pad_vocab_size=False
    )
    preprocess([text], corpus, config)
    return 0
