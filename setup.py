"""Packaging of lamb-tf; the optimizer needs TensorFlow alone, everything else is an extra."""

import pathlib
import re

from setuptools import setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lamb_tf/__init__.py").read_text())[1]

PRETRAINING = [
    "absl-py",
    "matplotlib",
    "sentencepiece",
    "tensorflow-text>=2.20",
    "tf-keras>=2.20",
    "tf-models-official>=2.20",
    "tqdm",
]
TPU = ["cloud-tpu-client"]
# jax only drives the TPU compiler in libtpu, through an interface that changes with each release.
PREFLIGHT = [
    "jax==0.10.2; platform_system == 'Linux'",
    "jaxlib==0.10.2; platform_system == 'Linux'",
    "libtpu==0.0.52; platform_system == 'Linux'",
]
TEST = [
    "gcp-storage-emulator==2026.7.19",
    "hypothesis",
    "mypy",
    "optax",
    "pytest",
    "pytest-xdist",
    "ruff",
    "trustme==1.2.1",
]

setup(
    name="lamb-tf",
    version=VERSION,
    description="The LAMB optimizer for TensorFlow, and BERT pre-training with it",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["lamb_tf", "pretraining", "tpu"],
    package_data={"lamb_tf": ["py.typed"]},
    install_requires=["tensorflow>=2.20"],
    extras_require={
        "pretraining": PRETRAINING,
        "tpu": TPU,
        "preflight": PREFLIGHT,
        "test": PRETRAINING + TPU + PREFLIGHT + TEST,
    },
)
