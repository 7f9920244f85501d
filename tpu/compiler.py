"""Compiles a TensorFlow function for a TPU slice on a machine that has none, with libtpu's compiler.

TensorFlow lowers the function to HLO, which is the same for every device; the compiler in libtpu, driven
through jax, makes of it the program that each device of the slice would run. The interfaces of
jax used here are private and change with every release, so `setup.py` pins jax, jaxlib and
libtpu exactly, and no other file touches them.
"""

import contextlib
import functools
import importlib
import os
import re
import signal
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tpu.chips import GIB, Slice
from tpu.program import Memory, Program

INSTALL = "pip install -e '.[preflight]' -c constraints.txt"
# libtpu asks Google's metadata server what machine this is, and lets one process load it at a time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
_NO_GATHER_ON_SPARSE_CORE = {
    "xla_tpu_enable_offloading_scatter_to_sparsecore": False,
    "xla_tpu_offload_all_supported_gathers_to_sparsecore": False,
    "xla_tpu_offload_gather_to_sparsecore": False,
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CompileError(RuntimeError):
    """The function cannot run on this slice, or there is no compiler; the text is one line."""


class OutOfMemoryError(CompileError):
    """The program needs more memory than a device has.

    Attributes:
      needed: bytes of temporaries, or of the whole program where the compiler says that.
      available: bytes that a program may use.
    """

    def __init__(self, message: str, needed: int, available: int):
        super().__init__(message)
        self.needed = needed
        self.available = available


class _UnreadableError(Exception):
    """There is a program, and jaxlib cannot tell what is in it."""


def cross_replica_sum(where: Slice) -> Callable[[Any], Any]:
    """Returns a function that sums a nest of tensors over all devices of a slice.

    It is what a strategy's all-reduce becomes on a TPU; outside of a strategy that would become nothing.
    """
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    everyone = np.arange(where.num_devices, dtype=np.int32)[None]

    def total(value: tf.Tensor) -> tf.Tensor:
        return gen_xla_ops.xla_all_reduce(
            input=value, group_assignment=everyone, reduce_op="Add", mode="CrossReplica"
        )

    return lambda nest: tf.nest.map_structure(total, nest)


def replica_number() -> tf.Tensor:
    """Returns an int32 scalar: which of the devices this one is, while the program runs."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    return gen_xla_ops.xla_replica_id()


def topology_devices(where: Slice) -> int:
    """Returns how many devices libtpu's compiler sees in a slice.

    Raises:
      CompileError: the compiler is not installed, or does not know the slice.
    """
    return len(_devices(where))


def compile_step(
    function: Callable, arguments: Sequence[tf.TensorSpec | tf.Tensor], where: Slice
) -> Program:
    """Compiles a function as every device of a slice would run it.

    Args:
      function: takes `arguments`; sums over devices are made by `cross_replica_sum`. It may read and
        assign variables; what is compiled contains them.
      arguments: tensors or their shapes and dtypes.
      where: the slice.

    Raises:
      OutOfMemoryError: a device has too little memory.
      CompileError: an operation that TPUs lack, a compiler that is not installed or not known to work.
    """
    topology_devices(where)  # before the function is traced, which may take longer
    return compile_hlo(lower(function, arguments), where)


def lower(function: Callable, arguments: Sequence[tf.TensorSpec | tf.Tensor]) -> bytes:
    """Returns the HLO of a function, its variables included, as a serialized `HloModuleProto`.

    Raises:
      CompileError: an operation that XLA lacks.
    """
    compiled = tf.function(function, jit_compile=True, autograph=False)
    try:
        ir = compiled.experimental_get_compiler_ir(*arguments)
        return ir(stage="hlo_serialized", platform_name="CPU")
    except (ValueError, tf.errors.OpError) as error:
        raise CompileError(_lowering_failure(str(error))) from None


def compile_hlo(hlo: bytes, where: Slice) -> Program:
    """Compiles what `lower` returns; several threads may do so at once.

    Raises:
      OutOfMemoryError: a device has too little memory.
      CompileError: the compiler refuses it.
    """
    try:
        return _read(_executable(hlo, where, {}), where)
    except _UnreadableError:
        # jaxlib cannot read a program that gathers on the SparseCore of a v6e.
        try:
            return _read(_executable(hlo, where, _NO_GATHER_ON_SPARSE_CORE), where)
        except _UnreadableError as error:
            raise CompileError(str(error)) from None


def _executable(hlo: bytes, where: Slice, settings: dict[str, Any]) -> Any:
    private, devices = _private(), _devices(where)
    options = private.compiler.get_compile_options(
        num_replicas=len(devices),
        num_partitions=1,
        device_assignment=np.array([[device.id] for device in devices]),
        env_options_overrides=settings,
    )
    with _environment(), private.mlir.make_ir_context():
        try:
            module = _stablehlo(hlo, private)
            group = private.jax.DeviceList(tuple(devices))
            return devices[0].client.compile(module, group, options)
        except Exception as error:  # the compiler raises what it likes
            raise _compile_failure(str(error), where) from None


def _read(executable: Any, where: Slice) -> Program:
    stats, costs = executable.get_compiled_memory_stats(), executable.cost_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliases=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    try:
        text = executable.hlo_modules()[0].to_string()
    except Exception as error:  # jaxlib's reader, where the compiler writes what it does not know
        raise _UnreadableError(
            f"it compiles for {where.chip.name} and takes {memory.total / GIB:.2f} of "
            f"{where.hbm_bytes / GIB:.2f} GiB, but jaxlib cannot read the program: {_line(str(error))}"
        ) from None
    return Program(
        text,
        memory=memory,
        flops=costs.get("flops", 0.0),
        bytes_accessed=costs.get("bytes accessed", 0.0),
    )


def _lowering_failure(text: str) -> str:
    """Names the operations and the line of the program that made the first of them."""
    names = re.findall(r"No registered '(\w+)' OpKernel", text)
    names = names or re.findall(r"(?:Failure to legalize|\{\{node) ([\w/.]+)", text)
    if not names:
        return f"it does not compile: {_line(text)}"
    lines = [line for line in re.findall(r'File "([^"]+", line \d+)', text)]
    own = [line for line in lines if "site-packages" not in line] or lines
    place = f", made in {own[-1].replace(chr(34), '')}" if own else ""
    return (
        f"it holds an operation that TPUs lack: {', '.join(dict.fromkeys(names))}{place}. Expected "
        "operations that XLA can compile; do this one on the host, in the input pipeline"
    )


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Sets what libtpu reads, where the user has not, for as long as it is at work."""
    added = [name for name in _ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _stablehlo(hlo: bytes, private: Any) -> Any:
    """Returns the MLIR module of an HLO module, names of TensorFlow's operations included."""
    ir = private.mlir.ir
    module = ir.Module.parse(private.jax.mlir.hlo_to_stablehlo(hlo))
    copies = []

    def visit(operation: Any) -> Any:
        if operation.name == "mhlo.copy":
            copies.append(operation.operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    # TensorFlow marks variables that it returns as copies, for which StableHLO has no form.
    for copy in copies:
        with ir.InsertionPoint(copy), copy.location:
            barrier = private.stablehlo.OptimizationBarrierOp([copy.operands[0]])
        copy.results[0].replace_all_uses_with(barrier.results[0])
        copy.erase()
    return module


def _compile_failure(text: str, where: Slice) -> CompileError:
    if "RESOURCE_EXHAUSTED" in text:
        sizes = [
            int(float(number) * _UNITS[unit])
            for number, unit in re.findall(r"\b([\d.]+)([KMGT]?)i?B?\b(?=[).\s])", text)
            if "." in number or unit
        ]
        if len(sizes) >= 2:
            return OutOfMemoryError(
                f"it does not fit: temporaries need {sizes[0] / GIB:.2f} GiB where a program on "
                f"{where.chip.name} has {sizes[1] / GIB:.2f} GiB",
                sizes[0],
                sizes[1],
            )
    return CompileError(f"{where.chip.name}'s compiler refuses it: {_line(text)}")


def _line(text: str) -> str:
    return " ".join(text.split())[:400]


@functools.cache
def _private() -> Any:
    """Imports what drives the compiler.

    Raises:
      CompileError: it is not installed, or is another release.
    """
    paths = {
        "compiler": "jax._src.compiler",
        "mlir": "jax._src.interpreters.mlir",
        "jax": "jax._src.lib._jax",
        "stablehlo": "jax._src.lib.mlir.dialects.hlo",
        "topologies": "jax.experimental.topologies",
    }
    try:
        with _environment():
            importlib.import_module("libtpu")
            return types.SimpleNamespace(**{name: _member(path) for name, path in paths.items()})
    except (ImportError, AttributeError) as error:
        raise CompileError(
            f"the TPU compiler is not installed ({_line(str(error))}). Install it: {INSTALL}"
        ) from None


def _take_back_signals() -> None:
    """Undoes that libtpu, once loaded, prints pages about the machine's state when it is to stop."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


def _member(path: str) -> Any:
    package, _, name = path.rpartition(".")
    with contextlib.suppress(ImportError):
        return importlib.import_module(path)
    return getattr(importlib.import_module(package), name)


@functools.lru_cache(maxsize=8)
def _devices(where: Slice) -> Sequence[Any]:
    settings = {"chip_config_name": where.chip_config} if where.chip_config else {}
    topologies = _private().topologies
    try:
        with _environment():
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=where.compiler_topology, **settings
            )
            _take_back_signals()
            return description.devices
    except Exception as error:  # the plug-in's own
        raise CompileError(
            f"{where.name}: libtpu's compiler does not know it: {_line(str(error))}"
        ) from None
