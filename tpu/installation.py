"""What of TensorFlow and its companions is installed, and whether the versions fit each other.

Read from the metadata of the distributions, so that an installation that cannot even be imported is
explained. `tensorflow-tpu` and `tensorflow` are two distributions of one package: what requires the
one works with the other, and one that is installed over the other replaces its files.
"""

import dataclasses
import importlib.metadata
import pathlib
import sys
from collections.abc import Iterator, Mapping

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tpu.failures import Fault

OURS = "lamb-tf"
TPU_BUILD = "tensorflow-tpu"
BUILDS = ("tensorflow", "tensorflow-cpu", TPU_BUILD)
# Whose requirements are looked at.
CHECKED = (
    OURS,
    *BUILDS,
    "tensorflow-text",
    "tf-keras",
    "tf-models-official",
    "cloud-tpu-client",
    "jax",
    "jaxlib",
)
COMPANIONS = ("tensorflow-text", "tf-keras", "tf-models-official")  # one for each TensorFlow
# The driver of the chips that a build can load. Its own metadata asks for any libtpu~=0.0.14, but
# 0.0.32 lacks one of the functions that it looks up (TpuExecutable_FreeMaybeOwningDeviceMemoryArray)
# and 0.0.52 lacks 142 of 212: with that one TensorFlow ends the process when it is imported (tried).
LIBTPU_SERIES = {"2.20": (">=0.0.14,<=0.0.31", "0.0.30")}
INSTALL_EXTRA = "pip install -e '.[{}]' -c constraints.txt"
# Of each build the same name with other contents, in this order of size; and the first to be missing.
_TELLING_FILES = ("tensorflow/libtensorflow_cc.so.2", "tensorflow/__init__.py")


@dataclasses.dataclass(frozen=True)
class Distribution:
    """One installed distribution.

    Attributes:
      name: canonical, as in "tf-keras".
      version: such as "2.20.0".
      requires: its requirements, as in its metadata.
      claims_tensorflow: whether it installed a package `tensorflow`.
      damaged: files of it that are gone, or another's by now.
    """

    name: str
    version: str
    requires: tuple[str, ...] = ()
    claims_tensorflow: bool = False
    damaged: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


Installation = Mapping[str, Distribution]


def read_installation(path: list[str] | None = None) -> dict[str, Distribution]:
    """Returns what is installed, by canonical name.

    Args:
      path: folders to look into; None for those that Python imports from.
    """
    found: dict[str, Distribution] = {}
    for item in importlib.metadata.distributions(path=sys.path if path is None else path):
        name = canonicalize_name(item.metadata["Name"] or "")
        if name and name not in found:  # the first on the path is the one that is imported
            claims, damaged = _tensorflow_files(item, name)
            requires = tuple(item.requires or ())
            found[name] = Distribution(name, item.version, requires, claims, damaged)
    return dict(sorted(found.items()))


def _tensorflow_files(
    item: importlib.metadata.Distribution, name: str
) -> tuple[bool, tuple[str, ...]]:
    """Returns whether a distribution brings the package `tensorflow`, and what is not its any more."""
    if "tensorflow" not in name and not name.startswith("tf-nightly"):
        return False, ()
    record = item.read_text("RECORD")
    if record is None:  # some other installer's
        return name in BUILDS, ()
    sizes = {
        fields[0]: fields[-1]
        for fields in (line.split(",") for line in record.splitlines())
        if fields[0] in _TELLING_FILES
    }
    damaged = []
    for file in filter(sizes.__contains__, _TELLING_FILES):
        place, size = pathlib.Path(str(item.locate_file(file))), sizes[file]
        if not place.exists() or (size and place.stat().st_size != int(size)):
            damaged.append(file)
    return bool(sizes), tuple(damaged)


def tensorflow_fault(installed: Installation, on_tpu: bool) -> Fault | None:
    """Returns what is wrong with the package `tensorflow`, None where nothing is.

    Args:
      installed: see `read_installation`.
      on_tpu: whether it shall drive a TPU of this machine, for which only `tensorflow-tpu` is built.
    """
    owners = [d for d in installed.values() if d.claims_tensorflow]
    if not owners:
        series, (_, driver) = next(iter(LIBTPU_SERIES.items()))
        build = f"--no-deps '{TPU_BUILD}=={series}.*' libtpu=={driver}"
        return Fault(
            "expected TensorFlow. Received: none installed",
            f"Remedy: pip install {build if on_tpu else '-e . -c constraints.txt'}",
        )
    kept = next((d for d in owners if (d.name == TPU_BUILD) == on_tpu), owners[0])
    if len(owners) > 1:
        return Fault(
            f"expected one distribution of the package `tensorflow`. Received: {_listed(owners)}; "
            "each has overwritten files of the other",
            f"Remedy: pip uninstall -y {' '.join(d.name for d in owners if d is not kept)} && pip "
            f"install --force-reinstall --no-deps {kept.name}=={kept.version}",
        )
    if on_tpu and kept.name != TPU_BUILD:
        return Fault(
            f"expected {TPU_BUILD}, the build that drives a TPU of this machine. Received: {kept}",
            f"Remedy: pip uninstall -y {kept.name} && pip install --no-deps "
            f"{TPU_BUILD}=={kept.version} {_driver(kept.version)}",
        )
    if kept.damaged:
        return Fault(
            f"expected the files of {kept} as they were installed. Received: others, or none, of "
            f"{', '.join(kept.damaged)}",
            f"Remedy: pip install --force-reinstall --no-deps {kept.name}=={kept.version}",
        )
    return None


def version_faults(installed: Installation) -> list[Fault]:
    """Returns a fault for each requirement among the distributions that is not met."""
    faults, seen = [], set()
    if fault := driver_fault(installed):
        faults.append(fault)
    for name in CHECKED:
        for requirement, is_needed in _requirements(installed.get(name)):
            provider = _provider(installed, canonicalize_name(requirement.name))
            if not is_needed and (provider is None or _is_preflights(requirement, installed)):
                continue
            if provider and requirement.specifier.contains(provider.version, prereleases=True):
                continue
            fault = _unmet(installed[name], requirement, provider)
            if fault.remedy not in seen:  # one command may mend several
                seen.add(fault.remedy)
                faults.append(fault)
    return faults


def driver_fault(installed: Installation) -> Fault | None:
    """Returns what is wrong where the build for TPUs would crash on the libtpu that is here."""
    build, driver = installed.get(TPU_BUILD), installed.get("libtpu")
    series = LIBTPU_SERIES.get(_series(build.version)) if build else None
    if not build or not driver or not series or SpecifierSet(series[0]).contains(driver.version):
        return None
    return Fault(
        f"{build} ends its process with another libtpu than {series[0]}. Received: {driver}",
        f"Remedy: pip install --no-deps libtpu=={series[1]}, and the extra preflight, which needs its own "
        "libtpu, into an environment of its own",
    )


def missing_of_extra(installed: Installation, extra: str) -> list[str]:
    """Returns the distributions of an extra of ours that are not installed."""
    ours = installed.get(OURS)
    requirements = [Requirement(text) for text in (ours.requires if ours else ())]
    return [
        r.name
        for r in requirements
        if r.marker
        and not r.marker.evaluate({"extra": ""})
        and r.marker.evaluate({"extra": extra})
        and _provider(installed, canonicalize_name(r.name)) is None
    ]


def tensorflow_version(installed: Installation) -> str:
    """Returns the version of TensorFlow, "" where there is none."""
    return next((d.version for d in installed.values() if d.claims_tensorflow), "")


def _requirements(distribution: Distribution | None) -> Iterator[tuple[Requirement, bool]]:
    """Yields what a distribution requires, and whether it cannot do without.

    Of ours the extras count as well: what is not needed must still fit where it is installed.
    """
    for text in distribution.requires if distribution else ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement, True
        elif distribution and distribution.name == OURS:
            extras = ("pretraining", "tpu", "preflight", "test")
            if any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                yield requirement, False


def _provider(installed: Installation, name: str) -> Distribution | None:
    if name in BUILDS:
        return next((d for d in installed.values() if d.claims_tensorflow), None)
    return installed.get(name)


def _is_preflights(requirement: Requirement, installed: Installation) -> bool:
    """The compiler of the extra preflight and the driver of a TPU are two versions of one libtpu."""
    return requirement.name == "libtpu" and TPU_BUILD in installed


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _driver(version: str) -> str:
    """Returns what to install beside a version of the build for TPUs."""
    series = LIBTPU_SERIES.get(_series(version))
    return f"libtpu=={series[1]}" if series else "libtpu"


def _unmet(by: Distribution, requirement: Requirement, provider: Distribution | None) -> Fault:
    wanted = f"{requirement.name}{requirement.specifier}"
    what = f"{by} needs {wanted}. Received: {provider or 'none installed'}"
    if provider and provider.claims_tensorflow and by.name in COMPANIONS:
        same = f"{by.name}=={_series(provider.version)}.*"
        return Fault(what, f"Remedy: pip install --no-deps '{same}'")
    if by.name == OURS and provider and not provider.claims_tensorflow:
        return Fault(what, f"Remedy: pip install '{wanted}' -c constraints.txt")
    if by.name == TPU_BUILD and requirement.name == "libtpu":
        wanted = _driver(by.version)
    return Fault(what, f"Remedy: pip install --no-deps '{wanted}'")


def _listed(distributions: list[Distribution]) -> str:
    return " and ".join(str(d) for d in distributions)
