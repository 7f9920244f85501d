"""What a run is: every flag as a field of a frozen dataclass, checked once.

This module runs before TensorFlow is imported, so that a mistyped flag is answered at once.
"""

import dataclasses
import re
from typing import Any

from pretraining.config_checks import (
    check_files,
    check_needs,
    check_preflight,
    spread_over_phases,
    warmups_of,
)
from pretraining.errors import InputError
from pretraining.flags import check_limits, flag
from pretraining.phases import Phase
from pretraining.recipes import DEFAULT_RECIPE, RECIPES

OPTIMIZERS = ("lamb", "lars", "adamw", "adam", "momentum", "adagrad")
MODEL_NAMES = ("tiny", "mini", "small", "medium", "base", "large")
PRECISIONS = ("float32", "bfloat16")
MODES = ("train_and_eval", "train", "eval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The flags of `python -m pretraining.run`; those of one kind stand together.

    A flag that may differ from phase to phase holds a tuple with a value for each; the constructor
    also takes a single one for all.
    """

    recipe: str = flag(
        DEFAULT_RECIPE,
        "values for the flags that are not given by hand",
        choices=tuple(RECIPES),
    )

    # Where it runs.
    tpu: str = flag(
        "", '"" for GPUs if any, else the CPU; "local"; a TPU name; or grpc://host:8470'
    )
    tpu_zone: str = flag("", "zone of a TPU given by name")
    gcp_project: str = flag("", "Google Cloud project of a TPU given by name")
    virtual_devices: int = flag(
        0, "number of logical CPU replicas, 0 for none", at_least=0, at_most=256
    )
    jit_compile: bool = flag(
        True, "let XLA compile forward and backward pass; on a TPU it always does"
    )

    # What it reads and writes.
    input_files: str = flag(
        "",
        "training records: comma-separated files, globs or folders, local or gs://; "
        "{max_seq_length} stands for the length of the phase. "
        "Empty: the program makes records from prose that it finds in this Python installation",
    )
    eval_files: str = flag("", "held-out records, likewise")
    skip_corrupt_records: bool = flag(
        False, "go on past damaged records, with the next good one in the place of each"
    )
    vocab_file: str = flag("", "WordPiece vocabulary of the records, a token a line")
    output_dir: str = flag("./lamb_tf_run", "folder of this run, local or gs://")
    max_seq_length: int = flag(
        128, "tokens in an example, as in the records", identity=True, per_phase=True, at_least=8
    )
    max_predictions_per_seq: int = flag(
        20,
        "masked tokens in an example at most, as in the records",
        identity=True,
        per_phase=True,
        at_least=1,
    )

    # The model.
    model: str = flag("tiny", "size of the BERT", choices=MODEL_NAMES)
    bert_config_file: str = flag("", "a bert_config.json, instead of --model")
    init_checkpoint: str = flag(
        "",
        "start from the weights of this checkpoint of a run of this program, at step 0",
        identity=True,
    )

    # The optimizer and its schedule.
    optimizer: str = flag("lamb", "the optimizer", identity=True, choices=OPTIMIZERS)
    learning_rate: float = flag(
        0.01, "peak learning rate", identity=True, per_phase=True, above=0.0
    )
    warmup_steps: int = flag(
        -1,
        "updates of linear warm-up from zero to the peak; -1 for 100, or an eighth of a short run",
        identity=True,
        per_phase=True,
        at_least=-1,
    )
    warmup_first_step: int = flag(
        0,
        "where the warm-up begins; below 0 the run starts in the middle of it",
        identity=True,
        per_phase=True,
        at_most=0,
    )
    num_train_steps: int = flag(
        800, "updates", identity=True, per_phase=True, at_least=1, at_most=10**8
    )
    poly_power: float = flag(
        1.0, "power of the polynomial decay", identity=True, per_phase=True, at_least=0.0
    )
    end_learning_rate: float = flag(
        0.0, "learning rate at the end of the decay", identity=True, per_phase=True, at_least=0.0
    )
    rewarmup: bool = flag(
        True,
        "each phase has a warm-up and a decay of its own; false: one of each spans all phases",
        identity=True,
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
        32,
        "global batch of an update; 0 for 32 a replica",
        identity=True,
        per_phase=True,
        at_least=0,
        at_most=2**24,
    )
    eval_batch_size: int = flag(
        0, "global batch of the evaluation; 0 for a micro-batch on each replica", at_least=0
    )
    accumulation_steps: int = flag(
        0,
        "micro-batches of an update on each replica; 0 for as few as fit into memory",
        per_phase=True,
        at_least=0,
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
    save_every_steps: int = flag(
        200, "checkpoint interval, 0 for only at the end of a phase", at_least=0
    )
    keep_checkpoints: int = flag(3, "how many of the newest checkpoints stay", at_least=1)
    keep_every_steps: int = flag(
        0, "checkpoints of multiples of this step stay as well, 0 for none", at_least=0
    )
    eval_every_steps: int = flag(
        400, "evaluation interval, 0 for only at the end of a phase", at_least=0
    )
    eval_steps: int = flag(0, "batches of an evaluation, 0 for all", at_least=0)
    eval_checkpoint: str = flag("", "checkpoint for --mode=eval, the newest one by default")
    log_layers_every_steps: int = flag(
        20, "interval of norms and trust ratios of every layer in the logs, 0 for never", at_least=0
    )
    max_skipped_steps: int = flag(
        10,
        "stop after so many updates in a row were skipped because of a gradient that is not finite, "
        "0 for never",
        at_least=0,
    )
    profile_steps: str = flag("", "a:b records a profile for TensorBoard from update a to b")
    dry_run: bool = flag(False, "print the plan of the run and do nothing")
    preflight: str = flag(
        "",
        "a TPU slice such as v3-2048 or v5litepod-256: compile the steps of this run for it, on this "
        "machine, print memory, time and cost, and do nothing else",
    )
    preflight_search: bool = flag(
        False, "with --preflight: find the largest micro-batch that fits, and the accumulation"
    )
    price_per_chip_hour: float = flag(
        0.0, "with --preflight: what a chip costs an hour, in any currency", at_least=0.0
    )

    @classmethod
    def of_flags(cls, **given: Any) -> "Config":
        """Returns the configuration of flags given by hand, over those of their recipe.

        Raises:
          InputError: they cannot work.
        """
        recipe = given.get("recipe", DEFAULT_RECIPE)
        preset = RECIPES[recipe].flags if recipe in RECIPES else {}
        return cls(**{**preset, **given})

    def __post_init__(self) -> None:
        for name, values in spread_over_phases(self).items():
            object.__setattr__(self, name, values)
        check_limits(self)
        object.__setattr__(self, "warmup_steps", warmups_of(self))
        for length, places in zip(self.max_seq_length, self.max_predictions_per_seq, strict=True):
            if places > length:
                raise InputError(
                    f"--max_predictions_per_seq={places}: expected at most --max_seq_length. "
                    f"Received: --max_seq_length={length}"
                )
        self.profiled  # noqa: B018  # raises
        if not self.output_dir:
            raise InputError("--output_dir: expected a folder. Received: nothing")
        if set("*?[") & set(self.output_dir):
            raise InputError(
                f"--output_dir={self.output_dir}: expected a name without * ? [, because TensorFlow "
                "restores a checkpoint by a pattern"
            )
        check_files(self)
        check_needs(self)
        check_preflight(self)

    @property
    def num_phases(self) -> int:
        """Phases of the run."""
        return len(self.num_train_steps)

    @property
    def total_steps(self) -> int:
        """Updates of all phases together."""
        return sum(self.num_train_steps)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the run, in order."""
        fields = [f.name for f in dataclasses.fields(Phase)]
        own = [name for name in fields if name not in ("number", "first_step")]
        return tuple(
            Phase(
                number=i + 1,
                first_step=sum(self.num_train_steps[:i]),
                **{name: getattr(self, name)[i] for name in own},
            )
            for i in range(self.num_phases)
        )

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The updates before and after which the profile begins and ends.

        Raises:
          InputError: `--profile_steps` is no such pair.
        """
        if not self.profile_steps:
            return None
        match = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
        if not match or not int(match[1]) < int(match[2]) <= self.total_steps:
            raise InputError(
                f"--profile_steps={self.profile_steps}: expected a:b with a < b <= {self.total_steps}, "
                "the updates of the run"
            )
        return int(match[1]), int(match[2])

    def as_flags(self) -> dict[str, Any]:
        """Returns every flag by name; one value, or a list where there are several phases."""
        return {f.name: self._plain(f.name) for f in dataclasses.fields(self)}

    @property
    def identity(self) -> dict[str, Any]:
        """The flags that make this run another run when they change, by name."""
        return {
            f.name: self._plain(f.name) for f in dataclasses.fields(self) if f.metadata["identity"]
        }

    def _plain(self, name: str) -> Any:
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return value
        return value[0] if len(value) == 1 else list(value)
