"""The optimizer and the learning-rate schedule that a configuration names."""

import tf_keras

from lamb_tf.exclusions import BERT_EXCLUSIONS
from lamb_tf.keras2 import LAMB, LARS, WarmupPolynomialDecay
from pretraining.config import Config


def build_schedule(config: Config) -> WarmupPolynomialDecay:
    """Returns the learning rate as a function of the updates made so far."""
    totals = config.num_train_steps if config.rewarmup else (config.total_steps,)
    first, *others = (
        {
            "learning_rate": config.learning_rate[i],
            "warmup_steps": config.warmup_steps[i],
            "total_steps": total,
            "power": config.poly_power[i],
            "end_learning_rate": config.end_learning_rate[i],
            "first_step": config.warmup_first_step[i],
        }
        for i, total in enumerate(totals)
    )
    return WarmupPolynomialDecay(**first, next_phases=others)


def build_optimizer(
    config: Config, *, compiles_itself: bool | None = None
) -> tf_keras.optimizers.Optimizer:
    """Returns the optimizer; gradients are clipped before they reach it.

    Weight decay leaves out biases and layer norms in all optimizers, and so does the layer
    adaptation of LAMB and LARS.

    Args:
      config: the flags.
      compiles_itself: whether XLA compiles the updates of LAMB and LARS by themselves; `None` where that
        suits the device.
    """
    schedule = build_schedule(config)
    optimizers = tf_keras.optimizers
    moments = {"beta_1": config.beta_1, "beta_2": config.beta_2, "epsilon": config.epsilon}
    if config.optimizer == "lamb":
        return LAMB(
            schedule,
            **moments,
            weight_decay=config.weight_decay,
            exclude_from_weight_decay=list(BERT_EXCLUSIONS),
            layer_statistics=config.log_layers_every_steps > 0,
            jit_compile=compiles_itself,
        )
    if config.optimizer == "lars":
        return LARS(
            schedule,
            momentum=config.beta_1,
            weight_decay=config.weight_decay,
            exclude_from_weight_decay=list(BERT_EXCLUSIONS),
            layer_statistics=config.log_layers_every_steps > 0,
            jit_compile=compiles_itself,
        )
    decay = config.weight_decay or None
    if config.optimizer == "adamw":
        optimizer = optimizers.AdamW(schedule, **moments, weight_decay=config.weight_decay)
    elif config.optimizer == "adam":
        optimizer = optimizers.Adam(schedule, **moments, weight_decay=None)
    elif config.optimizer == "momentum":
        optimizer = optimizers.SGD(schedule, momentum=config.beta_1, weight_decay=decay)
    else:
        optimizer = optimizers.Adagrad(schedule, epsilon=config.epsilon, weight_decay=decay)
    optimizer.exclude_from_weight_decay(var_names=list(BERT_EXCLUSIONS))
    return optimizer
