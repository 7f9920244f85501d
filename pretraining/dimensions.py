"""The dimensions of the model that the flags name."""

from pretraining import found_data, model, vocabulary
from pretraining.config import Config
from pretraining.errors import InputError
from pretraining.recipes import RECIPES

GOOGLE_TOKENS = 30522  # of BERT's English vocabulary, for a plan without one


def vocab_size_of(config: Config, bert: model.BertConfig) -> int:
    """Returns the size of the vocabulary, where it is known before the data; else that of Google's.

    Raises:
      InputError: the vocabulary cannot be read.
    """
    if bert.vocab_size:
        return bert.vocab_size
    if config.vocab_file:
        return len(vocabulary.read_vocabulary(config.vocab_file))
    return found_data.VOCAB_SIZE if RECIPES[config.recipe].finds_data else GOOGLE_TOKENS


def bert_of(config: Config) -> model.BertConfig:
    """Returns the dimensions of the model.

    Raises:
      InputError: they cannot be read, or do not suit the lengths.
    """
    bert = model.MODELS[config.model]
    if config.bert_config_file:
        bert = model.read_bert_config(config.bert_config_file)
    longest = max(config.max_seq_length)
    if bert.max_position_embeddings < longest:
        raise InputError(
            f"--max_seq_length={longest}: expected at most the model's "
            f"{bert.max_position_embeddings} positions"
        )
    return bert
