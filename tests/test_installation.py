"""What is said of installations: whole ones, and those that cannot work."""

import dataclasses

import pytest

from tpu import installation
from tpu.installation import Distribution

CPU = Distribution("tensorflow", "2.20.0", ("keras>=3.10.0",), claims_tensorflow=True)
TPU = Distribution("tensorflow-tpu", "2.20.0", ("libtpu~=0.0.14",), claims_tensorflow=True)
OTHERS = [
    Distribution(
        "lamb-tf",
        "0.1.0",
        (
            "tensorflow>=2.20",
            'tf-keras>=2.20; extra == "pretraining"',
            'cloud-tpu-client; extra == "tpu"',
            'jax==0.10.2; platform_system == "Linux" and extra == "preflight"',
            'libtpu==0.0.52; platform_system == "Linux" and extra == "preflight"',
        ),
    ),
    Distribution("keras", "3.15.1"),
    Distribution("libtpu", "0.0.52"),
    Distribution("tf-keras", "2.20.1", ("tensorflow<2.21,>=2.20",)),
    Distribution(
        "tensorflow-text", "2.20.1", ('tensorflow<2.21,>=2.20.0; platform_machine != "x"',)
    ),
    Distribution("jax", "0.10.2", ('libtpu==0.0.42.*; extra == "tpu"',)),
]


def installed(*builds, **versions):
    """The distributions above; versions by name with _ for -, None to leave one out."""
    found = {d.name: d for d in [*OTHERS, *builds]}
    for name, version in versions.items():
        name = name.replace("_", "-")
        if version is None:
            found.pop(name)
        else:
            found[name] = dataclasses.replace(found[name], version=version)
    return found


@pytest.mark.parametrize(("build", "on_tpu"), [(CPU, False), (TPU, True), (TPU, False)])
def test_a_whole_installation_has_no_fault(build, on_tpu):
    found = installed(build, libtpu="0.0.30" if build is TPU else "0.0.52")
    assert installation.tensorflow_fault(found, on_tpu) is None
    assert installation.version_faults(found) == []


@pytest.mark.parametrize(
    ("version", "is_wrong"), [("0.0.14", False), ("0.0.30", False), ("0.0.52", True)]
)
def test_a_driver_that_would_crash_the_build_is_refused(version, is_wrong):
    """Its own requirement, libtpu~=0.0.14, does not tell; preflight's libtpu is another one."""
    faults = installation.version_faults(installed(TPU, libtpu=version))
    assert bool(faults) == is_wrong
    if faults:
        assert "Received: libtpu 0.0.52" in faults[0].what
        assert "pip install --no-deps libtpu==0.0.30" in faults[0].remedy


def test_the_tpu_needs_its_own_build():
    fault = installation.tensorflow_fault(installed(CPU), on_tpu=True)
    assert fault.what.endswith("Received: tensorflow 2.20.0")
    assert (
        "pip uninstall -y tensorflow && pip install --no-deps tensorflow-tpu==2.20.0"
        in fault.remedy
    )


@pytest.mark.parametrize(
    ("on_tpu", "gone", "kept"), [(True, CPU, TPU), (False, TPU, CPU)], ids=["TPU VM", "elsewhere"]
)
def test_two_builds_that_claim_the_package_are_refused(on_tpu, gone, kept):
    fault = installation.tensorflow_fault(installed(CPU, TPU), on_tpu)
    assert str(CPU) in fault.what and str(TPU) in fault.what
    assert f"pip uninstall -y {gone.name} &&" in fault.remedy
    assert fault.remedy.endswith(f"--force-reinstall --no-deps {kept.name}==2.20.0")


def test_a_build_that_lost_its_files_is_put_back():
    broken = dataclasses.replace(TPU, damaged=("tensorflow/__init__.py",))
    fault = installation.tensorflow_fault(installed(broken), on_tpu=True)
    assert "tensorflow/__init__.py" in fault.what
    assert "--force-reinstall --no-deps tensorflow-tpu==2.20.0" in fault.remedy


@pytest.mark.parametrize(("on_tpu", "word"), [(True, "tensorflow-tpu"), (False, "-e .")])
def test_no_tensorflow_at_all(on_tpu, word):
    assert word in installation.tensorflow_fault(installed(), on_tpu).remedy


@pytest.mark.parametrize(
    ("versions", "what", "remedy"),
    [
        (
            {"tensorflow_text": "2.18.0"},  # its own requirement below is that of 2.18
            "tensorflow-text 2.18.0 needs tensorflow<2.19,>=2.18. Received: tensorflow-tpu 2.20.0",
            "pip install --no-deps 'tensorflow-text==2.20.*'",
        ),
        ({"libtpu": None}, "needs libtpu~=0.0.14. Received: none", "--no-deps 'libtpu==0.0.30'"),
        ({"jax": "0.9.0"}, "lamb-tf 0.1.0 needs jax==0.10.2", "pip install 'jax==0.10.2' -c"),
        ({"tf_keras": "2.19.0"}, "lamb-tf 0.1.0 needs tf-keras>=2.20", "tf-keras>=2.20"),
    ],
)
def test_versions_that_do_not_fit(versions, what, remedy):
    found = installed(TPU, **{"libtpu": "0.0.30", **versions})
    if "tensorflow_text" in versions:
        text = found["tensorflow-text"]
        found[text.name] = dataclasses.replace(text, requires=("tensorflow<2.19,>=2.18",))
    (fault,) = installation.version_faults(found)
    assert what in fault.what
    assert remedy in fault.remedy


def test_preflight_has_its_own_libtpu():
    (fault,) = installation.version_faults(installed(CPU, libtpu="0.0.42"))
    assert "lamb-tf 0.1.0 needs libtpu==0.0.52. Received: libtpu 0.0.42" in fault.what


def test_an_extra_that_is_not_there_is_no_fault():
    found = installed(CPU, jax=None, libtpu=None)
    assert installation.version_faults(found) == []
    assert installation.missing_of_extra(found, "preflight") == ["jax", "libtpu"]
    assert installation.missing_of_extra(found, "tpu") == ["cloud-tpu-client"]
    assert installation.missing_of_extra(found, "pretraining") == []


def write_distribution(folder, name, version, files):
    """Installs files as pip does: the files, and their names with their sizes beside the metadata."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    (metadata / "RECORD").write_text("".join(f"{f},,{len(t)}\n" for f, t in files.items()))


def test_files_tell_which_build_came_last(tmp_path):
    file, library = "tensorflow/__init__.py", "tensorflow/libtensorflow_cc.so.2"
    write_distribution(tmp_path, "tensorflow_tpu", "2.20.0", {file: "same", library: "of the TPU"})
    read = installation.read_installation([str(tmp_path)])
    assert read == {"tensorflow-tpu": Distribution("tensorflow-tpu", "2.20.0", (), True, ())}

    write_distribution(tmp_path, "tensorflow", "2.20.0", {file: "same", library: "of the CPU!"})
    write_distribution(tmp_path, "tensorflow_text", "2.20.1", {"tensorflow_text/__init__.py": ""})
    read = installation.read_installation([str(tmp_path)])
    assert [d.name for d in read.values() if d.claims_tensorflow] == [
        "tensorflow",
        "tensorflow-tpu",
    ]
    assert read["tensorflow"].damaged == ()
    assert read["tensorflow-tpu"].damaged == (library,)

    # pip uninstall of the one takes the files of both.
    for path in (*(tmp_path / "tensorflow").iterdir(), *tmp_path.glob("tensorflow-2*/*")):
        path.unlink()
    (tmp_path / "tensorflow-2.20.0.dist-info").rmdir()
    read = installation.read_installation([str(tmp_path)])
    assert read["tensorflow-tpu"].damaged == (library, file)


def test_the_installation_of_these_tests_is_whole():
    found = installation.read_installation()
    assert installation.tensorflow_fault(found, on_tpu=False) is None
    assert installation.tensorflow_version(found).startswith("2.")
    assert installation.version_faults(found) == []
