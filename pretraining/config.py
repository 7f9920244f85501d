"""What a run is: every flag as a field of a frozen dataclass, checked once.

This module runs before TensorFlow is imported, so that a mistyped flag is answered at once.
"""

import dataclasses
from typing import Any

from pretraining.errors import InputError
from pretraining.flags import check_limits, flag

OPTIMIZERS = ("lamb", "lars", "adamw", "adam", "momentum", "adagrad")
MODEL_NAMES = ("tiny", "mini", "small", "medium", "base", "large")
PRECISIONS = ("float32", "bfloat16")
MODES = ("train_and_eval", "train", "eval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The flags of `python -m pretraining.run`, in the order in which `--help` lists them."""

    # Where it runs.
    tpu: str = flag(
        "", '"" for GPUs if any, else the CPU; "local"; a TPU name; or grpc://host:8470'
    )
    tpu_zone: str = flag("", "zone of a TPU given by name")
    gcp_project: str = flag("", "Google Cloud project of a TPU given by name")
    virtual_devices: int = flag(0, "number of logical CPU replicas, 0 for none", at_least=0)

    # What it reads and writes.
    input_files: str = flag(
        "",
        "training records: comma-separated files, globs or folders, local or gs://. "
        "Empty: the program makes records from prose that it finds in this Python installation",
    )
    eval_files: str = flag("", "held-out records, likewise")
    skip_corrupt_records: bool = flag(
        False, "go on past damaged records, with the next good one in the place of each"
    )
    vocab_file: str = flag("", "WordPiece vocabulary of the records, a token a line")
    output_dir: str = flag("./lamb_tf_run", "folder of this run, local or gs://")
    max_seq_length: int = flag(
        128, "tokens in an example, as in the records", identity=True, at_least=8
    )
    max_predictions_per_seq: int = flag(
        20, "masked tokens in an example at most, as in the records", identity=True, at_least=1
    )

    # The model.
    model: str = flag("tiny", "size of the BERT", choices=MODEL_NAMES)
    bert_config_file: str = flag("", "a bert_config.json, instead of --model")

    # The optimizer and its schedule.
    optimizer: str = flag("lamb", "the optimizer", identity=True, choices=OPTIMIZERS)
    learning_rate: float = flag(0.01, "peak learning rate", identity=True, above=0.0)
    warmup_steps: int = flag(
        -1,
        "updates of linear warm-up from zero to the peak; -1 for 100, or an eighth of a short run",
        identity=True,
        at_least=-1,
    )
    num_train_steps: int = flag(800, "updates in all", identity=True, at_least=1)
    poly_power: float = flag(1.0, "power of the polynomial decay", identity=True, at_least=0.0)
    end_learning_rate: float = flag(
        0.0, "learning rate at the end of the decay", identity=True, at_least=0.0
    )
    weight_decay: float = flag(
        0.01,
        "decay of all weights but biases and layer norms; adam has none",
        identity=True,
        at_least=0.0,
    )
    beta_1: float = flag(
        0.9, "decay rate of the first moment; the momentum", identity=True, at_least=0.0, below=1.0
    )
    beta_2: float = flag(
        0.999, "decay rate of the second moment", identity=True, at_least=0.0, below=1.0
    )
    epsilon: float = flag(1e-6, "added to the root of the second moment", identity=True, above=0.0)
    clip_global_norm: float = flag(
        1.0, "clip the gradient to this norm, 0 for never", identity=True, at_least=0.0
    )

    # Batches.
    train_batch_size: int = flag(
        32, "global batch of an update; 0 for 32 a replica", identity=True, at_least=0
    )
    eval_batch_size: int = flag(
        0, "global batch of the evaluation; 0 for that of training", at_least=0
    )
    accumulation_steps: int = flag(
        0, "micro-batches of an update on each replica; 0 for one", at_least=0
    )
    precision: str = flag(
        "float32",
        "dtype of activations; weights are float32 always",
        identity=True,
        choices=PRECISIONS,
    )

    # How it goes on.
    mode: str = flag("train_and_eval", "what to do", choices=MODES)
    seed: int = flag(1, "source of every random choice", identity=True, at_least=0, below=2**32)
    steps_per_loop: int = flag(20, "updates in one call to the device", at_least=1)
    save_every_steps: int = flag(200, "checkpoint interval, 0 for only at the end", at_least=0)
    keep_checkpoints: int = flag(3, "how many of the newest checkpoints stay", at_least=1)
    eval_every_steps: int = flag(400, "evaluation interval, 0 for only at the end", at_least=0)
    eval_steps: int = flag(0, "batches of an evaluation, 0 for all", at_least=0)
    eval_checkpoint: str = flag("", "checkpoint for --mode=eval, the newest one by default")
    dry_run: bool = flag(False, "print the plan of the run and do nothing")

    def __post_init__(self) -> None:
        check_limits(self)
        if self.warmup_steps == -1:
            object.__setattr__(self, "warmup_steps", min(100, self.num_train_steps // 8))
        if self.warmup_steps >= self.num_train_steps:
            raise InputError(
                f"--warmup_steps={self.warmup_steps}: expected less than --num_train_steps. "
                f"Received: --num_train_steps={self.num_train_steps}"
            )
        if self.end_learning_rate > self.learning_rate:
            raise InputError(
                f"--end_learning_rate={self.end_learning_rate}: expected at most --learning_rate. "
                f"Received: --learning_rate={self.learning_rate}"
            )
        if self.max_predictions_per_seq > self.max_seq_length:
            raise InputError(
                f"--max_predictions_per_seq={self.max_predictions_per_seq}: expected at most "
                f"--max_seq_length. Received: --max_seq_length={self.max_seq_length}"
            )
        if not self.output_dir:
            raise InputError("--output_dir: expected a folder. Received: nothing")
        if set("*?[") & set(self.output_dir):
            raise InputError(
                f"--output_dir={self.output_dir}: expected a name without * ? [, because TensorFlow "
                "restores a checkpoint by a pattern"
            )
        self._check_files()

    def _check_files(self) -> None:
        """Own records come with a vocabulary and, where there is an evaluation, held-out ones."""
        needed = {
            "train": ("input_files", "vocab_file"),
            "train_and_eval": ("input_files", "eval_files", "vocab_file"),
            "eval": ("eval_files", "vocab_file"),
        }[self.mode]
        given = [n for n in ("input_files", "eval_files", "vocab_file") if getattr(self, n)]
        missing = [name for name in needed if not getattr(self, name)]
        if given and missing:
            raise InputError(
                f"--{missing[0]}: expected beside --{given[0]}={getattr(self, given[0])} for "
                f"--mode={self.mode}. Received: nothing"
            )
        if self.eval_checkpoint and self.mode != "eval":
            raise InputError(
                f"--eval_checkpoint={self.eval_checkpoint}: expected --mode=eval beside it. "
                f"Received: --mode={self.mode}"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The flags that make this run another run when they change, by name."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.metadata["identity"]}
