"""Writes tests/launch/jobset_crd.json, the schema of a JobSet, from a release's custom resource definition.

python tests/launch/jobset_crd.py config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml

The file is of https://github.com/kubernetes-sigs/jobset, v0.12.0 (commit
f22e565ac3cc3265c7c45ef67ecffdc689af5d77), Copyright The Kubernetes Authors, Apache License 2.0. Its
descriptions are left out; nothing else is. No package on PyPI carries it.
"""

import json
import sys
from pathlib import Path

import yaml


def without_descriptions(schema):
    if isinstance(schema, list):
        return [without_descriptions(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {k: v for k, v in schema.items() if k != "description" or not isinstance(v, str)}
    return {key: without_descriptions(value) for key, value in kept.items()}


if __name__ == "__main__":
    resource = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    (version,) = (v for v in resource["spec"]["versions"] if v["name"] == "v1alpha2")
    schema = without_descriptions(version["schema"]["openAPIV3Schema"])
    schema["$comment"] = (
        "see tests/launch/jobset_crd.py: kubernetes-sigs/jobset v0.12.0, Apache-2.0"
    )
    text = json.dumps(schema, sort_keys=True, separators=(",", ":"))
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")
