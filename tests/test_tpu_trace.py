"""What `tf.distribute.TPUStrategy` makes of a step, traced over made-up TPUs, and run in place.

TensorFlow traces the replicas of a TPU without having one: their variables land on the CPU. What comes
out is the graph that a TPU's host would compile; the compiler itself is not asked here.
"""

import collections
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tensorflow.python.distribute import tpu_strategy
from tensorflow.python.framework import kernels
from tensorflow.python.tpu import tpu_replication
from tensorflow.python.tpu.tpu_system_metadata import TPUSystemMetadata

from lamb_tf import keras2, keras3
from lamb_tf.exclusions import BERT_EXCLUSIONS
from pretraining import input_pipeline, model
from pretraining.batch_plan import BatchPlan
from pretraining.evaluation import Evaluator
from pretraining.train_step import SUMS, PretrainingStep, SkippedSteps, Trainer
from tests.test_records import FORMAT
from tests.test_train_step import BERT, one_replica, train  # noqa: F401
from tpu.device_memory import replica_memory
from tpu.strategy import describe

REPLICAS = 2
# What TensorFlow's TPU bridge replaces; there are no kernels for them.
BRIDGE = {"CrossReplicaSum", "TPUReplicateMetadata"}


def made_up_tpu(replicas):
    devices = [f"/job:localhost/replica:0/task:0/device:TPU:{i}" for i in range(replicas)]
    devices = tuple(types.SimpleNamespace(name=name) for name in devices)
    system = TPUSystemMetadata(replicas, 1, replicas, None, devices)
    return tf.distribute.TPUStrategy(types.SimpleNamespace(get_tpu_system_metadata=lambda: system))


class Traced:
    """A function's graph, and which part of it belongs to the replicas."""

    def __init__(self, function, *args):
        graph = function.get_concrete_function(*args).graph.as_graph_def()
        self.functions = {f.signature.name: f for f in graph.library.function}
        marked = [*graph.node, *(n for f in self.functions.values() for n in f.node_def)]
        self.replica = [node for node in marked if "_tpu_replicate" in node.attr]
        self.nested = self._called_by(self.replica)
        outer = [f.node_def for name, f in self.functions.items() if name not in self.nested]
        outer = [node for nodes in [graph.node, *outer] for node in nodes]
        self.host = [node for node in outer if "_tpu_replicate" not in node.attr]

    def _called_by(self, nodes):
        """Names of the functions, loop bodies and branches that nodes call, however deep."""
        names = {a.func.name for n in nodes for a in n.attr.values() if a.func.name}
        inner = [self._called_by(self.functions[name].node_def) for name in names]
        return names.union(*inner)

    def compiled(self):
        """All nodes that the TPU compiler will see."""
        return [*self.replica, *(n for f in self.nested for n in self.functions[f].node_def)]


def lamb():
    schedule = keras2.WarmupPolynomialDecay(1e-2, warmup_steps=2, total_steps=10)
    exclusions = list(BERT_EXCLUSIONS)
    return keras2.LAMB(schedule, exclude_from_weight_decay=exclusions, layer_statistics=True)


@pytest.fixture(scope="module")
def network_and_step():
    strategy = made_up_tpu(REPLICAS)
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        with strategy.scope():
            network = model.build_pretrainer(BERT, 65)
            optimizer = lamb()
            optimizer.build(network.trainable_variables)
            skipped = SkippedSteps()
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    step = PretrainingStep(
        network,
        optimizer,
        skipped=skipped,
        seed=3,
        accumulation_steps=2,
        clip_global_norm=1.0,
        jit_compile=False,
    )
    return strategy, network, step


@pytest.fixture(scope="module")
def traced_step(network_and_step, train):  # noqa: F811
    strategy, _, step = network_and_step
    plan = BatchPlan(global_batch_size=8, num_replicas=REPLICAS, accumulation_steps=2)
    batches = strategy.distribute_datasets_from_function(
        lambda context: input_pipeline.train_dataset(train, FORMAT, plan, 3, 0, context)
    )
    trainer = Trainer(strategy, step, iter(batches))
    return Traced(trainer.train, tf.constant(3))


def test_gradients_are_summed_over_the_replicas_once_a_step(network_and_step, traced_step):
    _, network, _ = network_and_step
    counts = 2  # of masked tokens and of rows: the denominators of the losses
    tensors = len(network.trainable_variables) + len(SUMS) + counts
    assert sum(n.op == "CrossReplicaSum" for n in traced_step.replica) == tensors
    loops = [n.attr["body"].func.name for n in traced_step.replica if n.op == "While"]
    assert len(loops) == 1, "the loop over micro-batches"
    products = [n.op for n in traced_step.functions[loops[0]].node_def].count("MatMul")
    assert products > 10, "forward and backward pass are in it"
    for name in traced_step.nested:
        inner = traced_step.functions[name].node_def
        assert "CrossReplicaSum" not in {n.op for n in inner}, name


def test_an_update_is_one_branch_and_a_skipped_one_the_other(network_and_step, traced_step):
    _, network, _ = network_and_step
    (branch,) = [n for n in traced_step.replica if n.op == "If"]
    assigned = {
        name: sum(
            n.op == "AssignVariableOp"
            for n in traced_step.functions[branch.attr[name].func.name].node_def
        )
        for name in ("then_branch", "else_branch")
    }
    # Weight, two moments and the statistics of each; then the row of skipped steps, the rate, or no.
    each = 4 * len(network.trainable_variables)
    assert each < assigned["then_branch"] <= each + 2
    assert assigned["else_branch"] == len(["first", "layer"])


def test_every_operation_can_be_compiled_and_no_function_compiles_itself(traced_step):
    tf.function(lambda x: x + 1.0, jit_compile=True)(tf.zeros([]))  # registers XLA's kernels
    registered = kernels.get_all_registered_kernels().kernel
    known = {k.op for k in registered if k.device_type == "XLA_CPU_JIT"} | BRIDGE
    assert len(known) > 300
    assert {n.op for n in traced_step.compiled()} <= known
    functions = traced_step.functions.values()
    assert not [f.signature.name for f in functions if f.attr["_XlaMustCompile"].b]


def test_the_host_only_feeds_the_replicas_and_adds_up_their_sums(traced_step):
    """Work that lay outside would run on the host, or one operation at a time."""
    on_host = collections.Counter(n.op for n in traced_step.host)
    for op in ("MatMul", "Mul", "Square", "Softmax", "GatherV2", "AssignVariableOp"):
        assert on_host[op] == 0, op
    handles = [
        n
        for n in traced_step.host
        if n.op == "TPUReplicatedInput" and n.attr["T"].type == tf.resource.as_datatype_enum
    ]
    assert handles and all(n.attr["is_packed"].b for n in handles), "one handle for all replicas"


def test_evaluation_is_compiled_as_a_whole(network_and_step, train):  # noqa: F811
    strategy, network, _ = network_and_step
    plan = BatchPlan(global_batch_size=8, num_replicas=REPLICAS)
    evaluator = Evaluator(
        strategy,
        network,
        lambda context: input_pipeline.eval_dataset(train, FORMAT, plan, context),
        jit_compile=False,
    )
    traced = Traced(evaluator._loop, iter(evaluator._dataset), tf.constant(2))
    assert sum(n.op == "CrossReplicaSum" for n in traced.replica) == len(SUMS)
    assert "MatMul" in {n.op for n in traced.compiled()}
    assert "MatMul" not in {n.op for n in traced.host}


def test_a_tpu_is_described_and_has_memory(network_and_step):
    strategy, _, _ = network_and_step
    assert describe(strategy) == "2 replicas on TPU"
    assert replica_memory(strategy) == 8 * 2**30
    assert (
        replica_memory(strategy, "v3-32") == replica_memory(strategy, "v5litepod-4") == 16 * 2**30
    )


@pytest.mark.parametrize(
    ("library", "optimizer"),
    [(keras, keras3.LAMB), (tf_keras, keras2.LAMB), (keras, keras3.LARS), (tf_keras, keras2.LARS)],
    ids=["LAMB in Keras 3", "LAMB in Keras 2", "LARS in Keras 3", "LARS in Keras 2"],
)
def test_both_kerases_update_in_the_replicas(library, optimizer):
    strategy = made_up_tpu(REPLICAS)
    with strategy.scope():
        network = library.Sequential([library.layers.Input([3]), library.layers.Dense(4)])
        optimizer = optimizer(0.1, weight_decay=0.01)
        optimizer.build(network.trainable_variables)

    def replica_step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(network(x)))
        variables = network.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    @tf.function
    def step(x):
        strategy.run(replica_step, args=(x,))

    traced = Traced(step, tf.ones([2, 3]))
    functions = traced.functions.values()
    assert not [f.signature.name for f in functions if f.attr["_XlaMustCompile"].b]
    assert sum(n.op == "CrossReplicaSum" for n in traced.replica) == len(["kernel", "bias"])
    assert "AssignVariableOp" not in {n.op for n in traced.host}


@pytest.mark.parametrize("dataset", ["train_dataset", "eval_dataset"])
def test_the_input_runs_on_a_host_without_our_python(train, dataset):  # noqa: F811
    """It is built on the TPU's own hosts, where there is a TensorFlow server and nothing else."""
    plan = BatchPlan(global_batch_size=8, num_replicas=REPLICAS)
    start = (3, 0) if dataset == "train_dataset" else ()
    built = getattr(input_pipeline, dataset)(train, FORMAT, plan, *start)
    graph = tf.compat.v1.GraphDef.FromString(built._as_serialized_graph().numpy())
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    operations = {n.op for n in nodes}
    assert "ParseExampleV2" in operations
    assert not {op for op in operations if "PyFunc" in op or "Generator" in op}
    # All shapes are known: TPUs compile for them, and the loop asks no host whether there is more.
    assert all(spec.shape.is_fully_defined() for spec in tf.nest.flatten(built.element_spec))


class InPlace(tpu_replication.TPUReplicateContext):
    """The context of the one replica of a made-up TPU, whose operations stay where they are."""

    def __init__(self):
        super().__init__("in_place", 1, pivot=None)

    def get_replicated_var_handle(self, name, handle_id, vars_, is_mirrored=False, is_packed=False):
        variable = vars_[0]._distributed_variables[0] if is_packed else vars_[0]
        return variable.handle

    def AddOp(self, op):
        """Leaves the operation unmarked."""

    def AddInnerOp(self, op):
        """Leaves the operation unmarked."""

    def AddValue(self, val):
        return val


def in_place(computation, inputs, **options):
    """Stands for `tpu.replicate`: the computation of one replica becomes part of the host's graph."""
    (inputs,) = inputs
    inputs = tf.nest.map_structure(tf.identity, inputs)
    context = InPlace()
    context.Enter()
    try:
        return [tf.nest.flatten(computation(*inputs))]
    finally:
        context.Exit()


class Linear(PretrainingStep):
    """The gradient of the mean over all rows of a product of weights and numbers."""

    def micro_gradients(self, batch, mlm_count, nsp_count, stream):
        gradient = tf.reduce_sum(batch["numbers"], 0) / nsp_count
        return [gradient], {name: tf.constant(1.0) for name in SUMS}


def steps_of_linear(strategy, batches):
    """Returns the weights, and the updates made, skipped, and skipped without one in between."""
    with strategy.scope():
        weights = tf.Variable(np.arange(1.0, 5.0, dtype=np.float32), name="kernel")
        optimizer = keras2.LAMB(0.1, weight_decay=0.01)
        optimizer.build([weights])
        skipped = SkippedSteps()
    step = Linear(
        types.SimpleNamespace(trainable_variables=[weights]),
        optimizer,
        skipped=skipped,
        seed=3,
        accumulation_steps=2,
        clip_global_norm=0.5,
        jit_compile=False,
    )
    ones = np.ones([len(batches), batches.shape[1]], np.float32)
    features = {"numbers": batches, "row_weights": ones, "masked_lm_weights": ones[..., None]}
    dataset = strategy.distribute_datasets_from_function(
        lambda context: tf.data.Dataset.from_tensor_slices(features)
    )
    trainer = Trainer(strategy, step, iter(dataset))
    trainer.train(tf.constant(len(batches)))
    counters = (optimizer.iterations, skipped.total, skipped.in_row)
    return weights.numpy(), [int(counter.numpy()) for counter in counters]


def test_steps_under_a_tpu_strategy_are_those_of_a_cpu(monkeypatch):
    """Its variables, its contexts and their branches, with one replica on the CPU."""
    monkeypatch.setattr(tpu_strategy.tpu, "replicate", in_place)
    monkeypatch.setattr(tpu_strategy.tpu_ops, "cross_replica_sum", lambda x: tf.identity(x))
    batches = np.random.default_rng(0).normal(size=[4, 6, 4]).astype(np.float32)
    batches[1, 5, 0] = np.nan
    expected, counts = steps_of_linear(one_replica(), batches)
    weights, same_counts = steps_of_linear(made_up_tpu(1), batches)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert np.isfinite(weights).all() and (weights != np.arange(1.0, 5.0)).all()
    assert same_counts == counts == [4, 1, 0]
