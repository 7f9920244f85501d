"""One update against the definition of the loss, and one replica against two."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from lamb_tf import BERT_EXCLUSIONS
from lamb_tf.keras2 import LAMB
from pretraining import bad_numbers, input_pipeline, model
from pretraining.batch_plan import BatchPlan
from pretraining.errors import InputError
from pretraining.model import BertConfig
from pretraining.record_checks import RecordCheck
from pretraining.train_step import PretrainingStep, SkippedSteps, Trainer, means
from tests.test_records import FORMAT

DROPOUT_FREE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = BertConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    **DROPOUT_FREE,
)


@pytest.fixture(scope="module")
def train(small_records):
    check = RecordCheck(record_format=FORMAT, flag="--input_files")
    return check.run([f"{small_records.folder}/train-{i}.tfrecord" for i in range(3)])


def one_replica():
    return tf.distribute.OneDeviceStrategy("/cpu:0")


def two_replicas():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def sgd():
    return tf_keras.optimizers.SGD(1.0)


def train_some(
    train,
    strategy,
    *,
    accumulation=1,
    steps=3,
    jit=False,
    clip=0.0,
    optimizer=sgd,
    kind=PretrainingStep,
):
    """Returns the initial weights, the model, and the metrics of a few updates."""
    tf_keras.utils.set_random_seed(0)
    with strategy.scope():
        network = model.build_pretrainer(BERT, 65)
        optimizer = optimizer()
        optimizer.build(network.trainable_variables)
        skipped = SkippedSteps()
    plan = BatchPlan(
        global_batch_size=8,
        num_replicas=strategy.num_replicas_in_sync,
        accumulation_steps=accumulation,
    )
    batches = strategy.distribute_datasets_from_function(
        lambda context: input_pipeline.train_dataset(train, FORMAT, plan, 3, 0, context)
    )
    step = kind(
        network,
        optimizer,
        skipped=skipped,
        seed=3,
        accumulation_steps=accumulation,
        clip_global_norm=clip,
        jit_compile=jit,
    )
    before = network.get_weights()
    trainer = Trainer(strategy, step, iter(batches))  # tf.function holds it weakly
    output = trainer.train(tf.constant(steps))
    figures = {k: float(v) for k, v in output.items()}
    network.step = step
    return before, network, {**figures, **means(figures)}


def first_batch(train):
    plan = BatchPlan(global_batch_size=8, num_replicas=1)
    return next(iter(input_pipeline.train_dataset(train, FORMAT, plan, 3, 0)))


def test_the_gradient_is_that_of_the_mean_over_all_masked_tokens(train):
    """With SGD at rate 1 the weights move by the gradient of Keras' own losses."""
    before, network, output = train_some(train, one_replica(), steps=1)
    after = network.get_weights()
    network.set_weights(before)
    batch = first_batch(train)
    weights = batch["masked_lm_weights"].numpy()
    assert len(set(weights.sum(1))) > 1, "rows with different numbers of masked tokens"
    crossentropy = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    with tf.GradientTape() as tape:
        out = network(
            {k: v for k, v in batch.items() if k in network.encoder_network.inputs}
            | {"masked_lm_positions": batch["masked_lm_positions"]},
            training=False,
        )
        masked = tf.boolean_mask(out["mlm_logits"], weights > 0)
        labels = tf.boolean_mask(batch["masked_lm_ids"], weights > 0)
        mlm_loss = tf.reduce_mean(crossentropy(labels, masked))
        nsp_loss = tf.reduce_mean(crossentropy(batch["next_sentence_labels"], out["next_sentence"]))
        loss = mlm_loss + nsp_loss
    gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, network.trainable_variables)]
    np.testing.assert_allclose(output["mlm_loss"], mlm_loss, rtol=1e-5)
    np.testing.assert_allclose(output["nsp_loss"], nsp_loss, rtol=1e-5)
    hits = tf.argmax(masked, -1, tf.int32) == labels
    np.testing.assert_allclose(output["mlm_accuracy"], np.mean(hits), rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients))
    np.testing.assert_allclose(output["grad_norm"], norm, rtol=1e-4)
    network.set_weights(after)
    moved = {v.name: v.numpy() for v in network.trainable_variables}
    network.set_weights(before)
    for variable, gradient in zip(network.trainable_variables, gradients, strict=True):
        np.testing.assert_allclose(
            variable.numpy() - moved[variable.name], gradient, rtol=1e-3, atol=2e-6
        )


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (two_replicas, {}),
        (one_replica, {"accumulation": 4}),
        (two_replicas, {"accumulation": 2}),
        (one_replica, {"jit": True, "accumulation": 2}),
        (two_replicas, {"jit": True}),
    ],
    ids=["two replicas", "accumulation", "both", "XLA", "two replicas, XLA"],
)
def test_weights_do_not_depend_on_how_the_batch_is_spread(train, strategy, options):
    _, expected, metrics = train_some(train, one_replica(), clip=0.5)
    _, network, other = train_some(train, strategy(), clip=0.5, **options)
    for a, b in zip(network.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-4, err_msg=name)


def test_twenty_updates_of_lamb_do_not_depend_on_accumulation(train):
    def lamb():
        return LAMB(0.01, weight_decay=0.01, exclude_from_weight_decay=list(BERT_EXCLUSIONS))

    _, whole, _ = train_some(train, one_replica(), clip=1.0, steps=20, optimizer=lamb)
    _, parts, _ = train_some(
        train, one_replica(), clip=1.0, steps=20, optimizer=lamb, accumulation=4
    )
    for a, b in zip(whole.get_weights(), parts.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


class Poisoned(PretrainingStep):
    """NaN in the gradient of one layer, in one micro-batch of one replica, in the updates `at`."""

    at = (2,)  # counted from 1
    stream = 3  # replica 1, second micro-batch of two
    position = 7

    def micro_gradients(self, batch, mlm_count, nsp_count, stream):
        gradients, sums = super().micro_gradients(batch, mlm_count, nsp_count, stream)
        step = tf.cast(self.optimizer.iterations, tf.int32) + 1
        hit = tf.reduce_any(tf.equal(step, self.at)) & tf.equal(tf.cast(stream, tf.int32), 3)
        poison = tf.where(hit, np.nan, 1.0)
        gradients[self.position] *= poison
        return gradients, sums


class PoisonedForEver(Poisoned):
    at = tuple(range(2, 100))


def adam():
    return tf_keras.optimizers.Adam(0.01, jit_compile=False)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "XLA"])
def test_a_gradient_with_nan_skips_the_update_on_all_replicas_alike(train, jit):
    """Skipping update 2 is update 1, then update 3 with the batch and the moments it would have."""
    spread = {"accumulation": 2, "optimizer": adam, "jit": jit}
    before, network, output = train_some(train, two_replicas(), steps=2, kind=Poisoned, **spread)
    skipped = network.step.skipped
    assert [int(v.numpy()) for v in (skipped.total, skipped.in_row)] == [1, 1]
    assert (int(skipped.first.numpy()), int(skipped.layer.numpy())) == (2, Poisoned.position)
    assert int(network.step.optimizer.iterations.numpy()) == 2
    assert np.isnan(output["grad_norm"]) and output["longest_skip"] == 1
    _, once, first = train_some(train, two_replicas(), steps=1, **spread)
    for a, b in zip(network.get_weights(), once.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        network.step.optimizer.variables[1:], once.step.optimizer.variables[1:], strict=True
    ):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert output["loss"] == first["loss"], "a skipped update is no part of the mean"
    for variable in network.trainable_variables:
        copies = [v.numpy() for v in variable.values]
        np.testing.assert_array_equal(copies[0], copies[1])
    assert any((a != b).any() for a, b in zip(before, network.get_weights(), strict=True))


def test_the_run_goes_on_after_a_skipped_update_and_stops_after_many(train):
    _, network, output = train_some(train, two_replicas(), steps=4, kind=Poisoned, accumulation=2)
    skipped, layers = network.step.skipped, [v.name for v in network.trainable_variables]
    assert [int(v.numpy()) for v in (skipped.total, skipped.in_row)] == [1, 0]
    assert np.isfinite(output["loss"]) and np.isfinite(output["grad_norm"])
    bad_numbers.check_skipped(int(output["longest_skip"]), 2, skipped, layers, 4)
    _, network, output = train_some(
        train, two_replicas(), steps=4, kind=PoisonedForEver, accumulation=2
    )
    with pytest.raises(InputError, match="3 updates in a row, from update 2 on") as error:
        bad_numbers.check_skipped(int(output["longest_skip"]), 3, network.step.skipped, layers, 4)
    assert layers[Poisoned.position] in str(error.value)
    bad_numbers.check_skipped(int(output["longest_skip"]), 0, network.step.skipped, layers, 4)


def test_a_loss_that_explodes_is_reported_with_step_and_layer():
    bad_numbers.check_loss(10.0, 30522, "layer", 7)
    bad_numbers.check_loss(float("nan"), 30522, "layer", 7)
    with pytest.raises(InputError, match=r"Received: 200 at update 7; .* is some/layer"):
        bad_numbers.check_loss(200.0, 30522, "some/layer", 7)


def test_clipping_acts_on_the_gradient_of_the_global_batch(train):
    before, network, output = train_some(train, two_replicas(), steps=1, clip=0.5)
    assert output["grad_norm"] > 0.5, "the norm that is reported is that before clipping"
    moved = sum(
        np.sum(np.square(a - b)) for a, b in zip(before, network.get_weights(), strict=True)
    )
    np.testing.assert_allclose(np.sqrt(moved), 0.5, rtol=1e-4)


def test_the_unused_pooler_keeps_its_weights(train):
    before, network, _ = train_some(train, one_replica())
    names = [v.name for v in network.weights]
    pooler = [i for i, name in enumerate(names) if "pooler_transform" in name]
    assert len(pooler) == 2
    for i in pooler:
        np.testing.assert_array_equal(network.get_weights()[i], before[i])
    assert not any("pooler_transform" in v.name for v in network.trainable_variables)


def test_a_bert_config_of_google_is_read(tmp_path):
    """The configuration file of BERT-Base, as google-research/bert publishes it."""
    path = tmp_path / "bert_config.json"
    path.write_text(
        json.dumps(
            {
                "attention_probs_dropout_prob": 0.1,
                "hidden_act": "gelu",
                "hidden_dropout_prob": 0.1,
                "hidden_size": 768,
                "initializer_range": 0.02,
                "intermediate_size": 3072,
                "max_position_embeddings": 512,
                "num_attention_heads": 12,
                "num_hidden_layers": 12,
                "type_vocab_size": 2,
                "vocab_size": 30522,
            }
        )
    )
    config = model.read_bert_config(str(path))
    assert config == dataclasses.replace(model.MODELS["base"], vocab_size=30522)


def test_the_number_of_parameters_is_that_of_the_publication():
    """Turc et al. give 4.4M for tiny: its encoder, without the heads."""
    network = model.build_pretrainer(model.MODELS["tiny"], 30522)
    encoder = sum(int(np.prod(v.shape)) for v in network.encoder_network.weights)
    assert round(encoder / 1e5) == 44
