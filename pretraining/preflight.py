"""`--preflight=SLICE`: the run's own step compiled for a slice that nobody holds yet, and its plan."""

import dataclasses
import importlib.metadata
from typing import Any

from pretraining import batch_search, console, pod_plan_output
from pretraining.compiled_step import StepCompiler
from pretraining.config import Config
from pretraining.dimensions import bert_of, vocab_size_of
from pretraining.errors import InputError
from pretraining.pod_plan import plan_pod
from pretraining.run_directory import RunDirectory
from pretraining.run_plan import PhasePlan, plan_phases
from tpu.chips import Slice, parse_slice
from tpu.compiler import CompileError, OutOfMemoryError, topology_devices
from tpu.preflight import StepReport

PACKAGES = ("lamb-tf", "tensorflow", "tf-models-official", "jax", "jaxlib", "libtpu")


def run(config: Config) -> int:
    """Compiles every phase and prints what was found; writes it to `preflight-SLICE.json` as well.

    Returns:
      0.

    Raises:
      InputError: a phase cannot run on the slice.
    """
    where = parse_slice(config.preflight)
    directory = RunDirectory(config.output_dir)
    name = f"preflight-{where.name}.json"
    bert = bert_of(config)
    vocab_size = vocab_size_of(config, bert)
    price = config.price_per_chip_hour or None
    if config.dry_run:
        pod_plan_output.say(plan_pod(config, bert, vocab_size, where, price_per_chip_hour=price))
        return 0
    try:
        topology_devices(where)  # that there is a compiler, before anything that takes time
    except CompileError as error:
        raise InputError(f"--preflight={where.name}: {error}") from None
    plans = plan_phases(config, where.num_devices, where.hbm_bytes, bert, vocab_size)
    directory.create()
    console.say(
        f"Preflight for {where.name}: {where.num_chips} {where.chip.name} chips, {where.num_devices} devices; "
        f"{config.precision}, {config.optimizer}, {vocab_size:,} tokens. Nothing is trained. "
        "BERT-Large takes some minutes"
    )
    compiler = StepCompiler(config, bert, vocab_size, where)
    for plan in plans:
        train = plan.train
        compiler.begin(plan.phase, train.per_replica_batch_size, train.accumulation_steps)
    checkers = [_PhaseChecker(compiler, plan, where, config.preflight_search) for plan in plans]
    found = {
        "slice": where.name,
        "chips": where.num_chips,
        "devices": where.num_devices,
        "flags": config.as_flags(),
        "phases": [checker.findings for checker in checkers],
        "versions": _versions(),
    }
    try:
        reports = {checker.number: checker.check() for checker in checkers}
    except InputError:
        directory.write_json(name, found)
        raise
    pod = plan_pod(
        config,
        bert,
        vocab_size,
        where,
        batches={checker.number: checker.batch for checker in checkers},
        price_per_chip_hour=price,
        measured={number: report.work for number, report in reports.items()},
        bounds={number: report.bound for number, report in reports.items()},
    )
    directory.write_json(name, {**found, "plan": pod_plan_output.as_json(pod)})
    pod_plan_output.say(pod)
    console.say(f"Written to {directory.join(name)}")
    return 0


class _PhaseChecker:
    """Compiles one phase; on the way it fills `findings` for the JSON file.

    Attributes:
      batch: how the global batch is spread, as asked for or as found.
      findings: by name.
    """

    def __init__(self, compiler: StepCompiler, plan: PhasePlan, where: Slice, search: bool):
        self._compiler = compiler
        self._phase = plan.phase
        self._where = where
        self._search = search
        self._said: set[str] = set()
        self.batch = plan.train
        self.findings: dict[str, Any] = {
            "phase": plan.phase.number,
            "max_seq_length": plan.phase.max_seq_length,
            "compiles": None,
        }

    @property
    def number(self) -> int:
        """Of the phase, from 1."""
        return self._phase.number

    def check(self) -> StepReport:
        """Returns the report of the phase.

        Raises:
          InputError: it cannot run on the slice.
        """
        phase = self._phase
        console.say(f"Phase {phase.number}: {phase.max_seq_length} tokens, {self.batch}")
        self.findings["batch"] = dataclasses.asdict(self.batch)
        try:
            report = self._compile(self.batch.per_replica_batch_size, self.batch.accumulation_steps)
        except OutOfMemoryError as error:
            self.findings |= {"compiles": False, "reason": str(error)}
            if not self._search:
                self._refuse(error)
        except CompileError as error:
            self.findings |= {"compiles": False, "reason": str(error)}
            raise InputError(f"{self._named}: {error}") from None
        if self._search:
            self._take_largest()
            report = self._compile(self.batch.per_replica_batch_size, self.batch.accumulation_steps)
        self.findings.pop("reason", None)
        self.findings |= {"compiles": True, "batch": dataclasses.asdict(self.batch)}
        self.findings |= report.as_json()
        for line in report.lines():
            console.say(f"  {line}")
        return report

    @property
    def _named(self) -> str:
        return f"--preflight={self._where.name}: phase {self._phase.number}"

    def _compile(self, rows: int, accumulation_steps: int) -> StepReport:
        try:
            report = self._compiler.compile(self._phase, rows, accumulation_steps)
        except OutOfMemoryError as error:
            self._say_once(f"  {rows} rows a device: {error}")
            raise
        seconds = self._compiler.seconds(self._phase, rows, accumulation_steps)
        self._say_once(
            f"  {rows} rows a device compiled in {seconds:.0f} s: "
            f"{report.program.memory.total / 2**30:.2f} GiB"
        )
        self.findings["seconds_to_compile"] = round(seconds, 1)
        return report

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            console.say(line)

    def _refuse(self, error: OutOfMemoryError) -> None:
        """Says what does not fit and what would."""
        console.say("  looking for the largest that fits")
        rows = self.batch.per_replica_batch_size
        largest = self._largest()
        self.findings["largest_rows_that_fit"] = largest
        remedy = (
            f"The largest that fits of those that divide the {self.batch.rows_per_replica} of a device is "
            f"{largest}: --accumulation_steps={self.batch.rows_per_replica // largest}"
            if largest
            else "Not even one row fits: take a smaller model or chips with more memory"
        )
        raise InputError(f"{self._named}: {rows} rows a device: {error}. {remedy}")

    def _take_largest(self) -> None:
        largest = self._largest()
        self.findings["largest_rows_that_fit"] = largest
        if not largest:
            raise InputError(f"{self._named}: not even one row of a device fits into its memory")
        self.batch = dataclasses.replace(
            self.batch, accumulation_steps=self.batch.rows_per_replica // largest
        )
        console.say(
            f"  The largest micro-batch that fits: {largest} of {self.batch.rows_per_replica} rows a device, "
            f"--accumulation_steps={self.batch.accumulation_steps}: {self.batch}"
        )

    def _largest(self) -> int:
        whole = self.batch.rows_per_replica

        def attempt(rows: int) -> batch_search.Trial:
            try:
                report = self._compile(rows, whole // rows)
            except OutOfMemoryError as error:
                return batch_search.Trial(False, error.needed)
            except CompileError as error:
                raise InputError(f"{self._named}: {error}") from None
            return batch_search.Trial(True, report.program.memory.total)

        return batch_search.largest_that_fits(
            attempt,
            batch_search.sizes_of(whole),
            self.batch.per_replica_batch_size,
            self._where.hbm_bytes,
            self._compiler.state_bytes,
        )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
