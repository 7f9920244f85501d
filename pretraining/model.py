"""BERT with its two pre-training heads, from tf-models-official."""

import dataclasses
import json
import math

import tensorflow as tf
import tf_keras
from official.nlp.modeling import layers, models, networks

from pretraining.errors import InputError
from pretraining.files import why

ACTIVATIONS = ("gelu", "relu", "tanh", "linear")  # those of google-research/bert


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The dimensions of a BERT, under the names of Google's `bert_config.json`.

    `vocab_size` may be above the number of tokens, as where it is rounded up for a TPU; 0 stands
    for that number.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    vocab_size: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            accepted = (int, float) if field.type is float else field.type
            if isinstance(value, bool) or not isinstance(value, accepted):
                raise ValueError(
                    f"{field.name} must be a {field.type.__name__}. Received: {value!r}"
                )
            if field.type is int and value < (field.name != "vocab_size"):
                raise ValueError(f"{field.name} must be above 0. Received: {value}")
            if field.name.endswith("_prob") and not 0 <= value < 1:
                raise ValueError(f"{field.name} must be in [0, 1). Received: {value}")
        if not 0 < self.initializer_range < math.inf:
            raise ValueError(
                f"initializer_range must be above 0. Received: {self.initializer_range}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act must be one of {', '.join(ACTIVATIONS)}. Received: {self.hidden_act!r}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads. "
                f"Received: {self.hidden_size} and {self.num_attention_heads}"
            )


def _bert(layer_count: int, hidden_size: int) -> BertConfig:
    return BertConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layer_count,
        num_attention_heads=hidden_size // 64,
        intermediate_size=4 * hidden_size,
    )


# BERT-Base and BERT-Large of Devlin et al. (2018), and the miniatures of Turc et al.,
# "Well-Read Students Learn Better" (arXiv 1908.08962, table 1).
MODELS = {
    "tiny": _bert(2, 128),
    "mini": _bert(4, 256),
    "small": _bert(4, 512),
    "medium": _bert(8, 512),
    "base": _bert(12, 768),
    "large": _bert(24, 1024),
}


def read_bert_config(path: str) -> BertConfig:
    """Reads a `bert_config.json` as Google publishes them; unknown keys are ignored.

    Raises:
      InputError: the file cannot be read or lacks a dimension.
    """
    try:
        with tf.io.gfile.GFile(path) as file:
            values = json.load(file)
        known = {field.name for field in dataclasses.fields(BertConfig)}
        config = BertConfig(**{key: value for key, value in values.items() if key in known})
    except tf.errors.OpError as error:
        raise InputError(f"--bert_config_file={path}: {why(error, path, 'read')}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"--bert_config_file={path}: expected JSON. Received: {error}") from None
    except ValueError as error:
        raise InputError(f"--bert_config_file={path}: {error}") from None
    except TypeError as error:
        missing = str(error).split(":")[-1].strip()
        raise InputError(f"--bert_config_file={path}: expected the keys {missing}") from None
    return config


def build_pretrainer(
    config: BertConfig, num_tokens: int, *, initialized: bool = True
) -> models.BertPretrainerV2:
    """Builds BERT with a masked-LM and a next-sentence head, its variables created.

    Args:
      config: the dimensions.
      num_tokens: the size of the vocabulary, where `config.vocab_size` is 0.
      initialized: false for weights of 0, where nothing is going to be computed.

    Returns:
      A model from `input_word_ids`, `input_mask`, `input_type_ids` (int32, [batch, length]) and
      `masked_lm_positions` (int32, [batch, predictions]) to a dictionary with `mlm_logits`
      ([batch, predictions, vocab_size]) and `next_sentence` ([batch, 2]).
    """
    vocab_size = config.vocab_size or num_tokens
    activation = tf_keras.activations.get(config.hidden_act)
    if config.hidden_act == "gelu":
        activation = lambda x: tf_keras.activations.gelu(x, approximate=True)  # noqa: E731
    initializer = tf_keras.initializers.TruncatedNormal(stddev=config.initializer_range)
    if not initialized:
        initializer = tf_keras.initializers.Zeros()
    encoder = networks.BertEncoderV2(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_sequence_length=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        inner_dim=config.intermediate_size,
        inner_activation=activation,
        output_dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        initializer=initializer,
    )
    # The next-sentence head has a pooler of its own. Left trainable, the encoder's would get no
    # gradient, and weight decay alone would wear it down at LAMB's full step length.
    encoder.pooler_layer.trainable = False
    model = models.BertPretrainerV2(
        encoder,
        mlm_activation=activation,
        mlm_initializer=initializer,
        classification_heads=[
            layers.ClassificationHead(
                inner_dim=config.hidden_size,
                num_classes=2,
                dropout_rate=config.hidden_dropout_prob,
                initializer=initializer,
                name="next_sentence",
            )
        ],
    )
    _create_variables(model)
    return model


def _create_variables(model: models.BertPretrainerV2) -> None:
    ids = tf.zeros([1, 8], tf.int32)
    model(
        dict(
            input_word_ids=ids,
            input_mask=tf.ones_like(ids),
            input_type_ids=ids,
            masked_lm_positions=ids[:, :2],
        )
    )
