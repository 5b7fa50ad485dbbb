"""Job of the fork server: TEXT MODEL VOCABULARY CORPUS → a tokenizer and a corpus of the text."""

import sys

from megatron_pd.data.preprocess import preprocess
from megatron_pd.data.tokenizer import tokenizer_config
from megatron_pd.data.train_tokenizer import train_tokenizer


def main() -> int:
    text, model, vocab_size, corpus = sys.argv[1:]
    train_tokenizer([text], model, int(vocab_size))
    config = tokenizer_config("SentencePieceTokenizer", model)
    preprocess([text], corpus, config)
    return 0
