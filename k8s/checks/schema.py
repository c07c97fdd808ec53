"""Strict schemas: jobs by their operators' own models, core kinds by Kubernetes' schemas.

Unknown fields are rejected here: an API server drops them, or rejects the object, too late.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from k8s.cluster.objects import ROOT, Object, name_of
from pipeline.errors import DistillError

__all__ = ["KUBERNETES", "schema_mistakes"]

KUBERNETES = "1.32"
"""Version of the core schemas; HyperPod on EKS runs 1.30 to 1.33."""

HYPERPOD_MODELS = ROOT.parent / (
    ".hyperpod-models/sagemaker/hyperpod/training/config/hyperpod_pytorch_job_unified_config.py"
)
"""Of the package sagemaker-hyperpod, whose pins clash with ours; beside the environment."""

_SDK_ROOTS = {"PyTorchJob": "KubeflowOrgV1PyTorchJob"}
_PYDANTIC_ROOTS = {
    "TrainJob": ("kubeflow_trainer_api.models", "TrainerV1alpha1TrainJob"),
    "TrainingRuntime": ("kubeflow_trainer_api.models", "TrainerV1alpha1TrainingRuntime"),
    "Experiment": ("kubeflow_katib_api.models", "V1beta1Experiment"),
}


# No package has models of it; these are the fields that are used here, of the operator's reference.
_POD_MONITOR: dict[str, Any] = {
    "apiVersion": "monitoring.coreos.com/v1",
    "kind": "PodMonitor",
    "metadata": {},
    "spec": {
        "selector": {"matchLabels": {}},
        "podTargetLabels": [],
        "podMetricsEndpoints": [{"port": "", "path": "", "interval": ""}],
    },
}


def schema_mistakes(item: Object) -> list[str]:
    """Return one line per field that is unknown, missing or of another type.

    Raises:
        DistillError: a package that holds the schemas is not installed.
    """
    kind = item["kind"]
    try:
        if kind in _SDK_ROOTS:
            found = _sdk_mistakes(item, _SDK_ROOTS[kind], "")
        elif kind == "HyperPodPyTorchJob":
            found = _hyperpod_mistakes(item)
        elif kind == "PodMonitor":
            found = _unknown_keys(item, _POD_MONITOR)
        elif kind in _PYDANTIC_ROOTS:
            found = _pydantic_mistakes(item, *_PYDANTIC_ROOTS[kind])
        else:
            found = _core_mistakes(item)
    except ImportError as error:
        raise DistillError(
            f"manifests cannot be checked: {error}", do="run `make setup-dev` first"
        ) from None
    return [f"{name_of(item)}: {line}" for line in found]


def _unknown_keys(value: Any, known: Any, path: str = "") -> Iterator[str]:
    """Compare with an example: its keys may be there, its texts must; empty ones take anything."""
    if isinstance(known, dict) and known:
        for key in set(value) - set(known):
            yield f"{path}{key}: unknown field"
        for key in set(value) & set(known):
            yield from _unknown_keys(value[key], known[key], f"{path}{key}.")
    elif isinstance(known, list) and known:
        for item in value:
            yield from _unknown_keys(item, known[0], path)
    elif isinstance(known, str) and known and value != known:
        yield f"{path.rstrip('.')}: found {value!r}, expected {known!r}"


def _core_mistakes(item: Object) -> Iterator[str]:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        # Otherwise a kind without a schema would pass unchecked.
        yield f"apiVersion {item['apiVersion']}: no checker knows this kind"
    except kubernetes_validate.ValidationError as error:
        path = ".".join(str(part) for part in error.path)
        yield f"{path or 'top'}: {error.message}"


@cache
def _sdk_model(name: str) -> Any:
    from kubeflow.training import models

    return getattr(models, name, None)


def _sdk_mistakes(value: Any, kind: str, path: str) -> Iterator[str]:
    """Walk a value along the SDK's types: `str`, `list[T]`, `dict(str, T)`, or a model's name."""
    if listed := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{path}: found {value!r}, expected a list"
            return
        for index, item in enumerate(value):
            yield from _sdk_mistakes(item, listed[1], f"{path}[{index}]")
    elif mapped := re.fullmatch(r"dict\(str, (.+)\)", kind):
        if not isinstance(value, dict):
            yield f"{path}: found {value!r}, expected a mapping"
            return
        # Quantities may be numbers (`cpu: 4`); everything else in such a mapping is a text.
        inner = "quantity" if path.endswith(("limits", "requests")) else mapped[1]
        for key, item in value.items():
            yield from _sdk_mistakes(item, inner, f"{path}.{key}" if path else str(key))
    elif kind in _SCALARS:
        types, wording = _SCALARS[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            yield f"{path}: found {value!r}, expected {wording}"
    elif (model := _sdk_model(kind)) is not None:
        yield from _sdk_object(value, model, path)


_SCALARS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "quantity": ((str, int, float), "a quantity"),
}


def _sdk_object(value: Any, model: Any, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: found {value!r}, expected a mapping"
        return
    types = {model.attribute_map[name]: (name, kind) for name, kind in model.openapi_types.items()}
    given: dict[str, Any] = {}
    for key, item in value.items():
        inner = f"{path}.{key}" if path else str(key)
        if key not in types:
            yield f"{inner}: unknown field"
            continue
        name, kind = types[key]
        given[name] = item
        yield from _sdk_mistakes(item, kind, inner)
    try:
        # The models raise for a missing required field when they are constructed.
        model(**given)
    except ValueError as error:
        if missing := re.match(r"Invalid value for `(\w+)`, must not be `None`", str(error)):
            yield f"{path or 'top'}.{model.attribute_map[missing[1]]}: required, but not given"


@cache
def _hyperpod_model() -> Any:
    """Load the one file of the package that has the models; importing it asks for AWS's tools."""
    if not HYPERPOD_MODELS.exists():
        raise DistillError(
            f"{HYPERPOD_MODELS.parents[4].name}: the models of HyperPod's operator are not there",
            do="run `make hyperpod-models` first",
        )
    spec = importlib.util.spec_from_file_location("hyperpod_models", HYPERPOD_MODELS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic resolves names there
    spec.loader.exec_module(module)
    return module._HyperPodPytorchJob


def _hyperpod_mistakes(item: Object) -> Iterator[str]:
    from pydantic import ValidationError

    if item["apiVersion"] != "sagemaker.amazonaws.com/v1":
        yield f"apiVersion: found {item['apiVersion']}, expected sagemaker.amazonaws.com/v1"
    for key in set(item) - {"apiVersion", "kind", "metadata", "spec"}:
        yield f"{key}: unknown field"
    model = _hyperpod_model()
    # Its parts forbid unknown fields; the whole does not.
    for key in set(item["spec"]) - set(model.model_fields):
        yield f"spec.{key}: unknown field"
    try:
        model.model_validate(item["spec"], by_name=True, by_alias=False)
    except ValidationError as error:
        for detail in error.errors():
            place = ".".join(str(part) for part in ("spec", *detail["loc"]))
            yield f"{place}: {detail['msg']}"


def _pydantic_mistakes(item: Object, module: str, name: str) -> Iterator[str]:
    import importlib

    from pydantic import ValidationError

    model = getattr(importlib.import_module(module), name)
    try:
        model.model_validate(item)
    except ValidationError as error:
        for detail in error.errors():
            # The generated models wrap texts-or-numbers; an API server takes plain ones.
            union = str((detail.get("ctx") or {}).get("class_name", ""))
            if union.endswith(("Quantity", "IntOrString")) and isinstance(
                detail["input"], str | int | float
            ):
                continue
            yield f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}"
    yield from _unknown_fields(item, model, "")


def _unknown_fields(value: Any, annotation: Any, path: str) -> Iterator[str]:
    """Generated pydantic models ignore unknown fields; find them by walking the aliases."""
    from typing import get_args

    from pydantic import BaseModel

    if isinstance(value, list):
        inner = next(iter(get_args(annotation)), None)
        for index, item in enumerate(value):
            yield from _unknown_fields(item, _without_none(inner), f"{path}[{index}]")
    elif isinstance(value, dict) and isinstance(annotation, type):
        if not issubclass(annotation, BaseModel) or not annotation.model_fields:
            return
        known = {info.alias or key: info for key, info in annotation.model_fields.items()}
        if "actual_instance" in known:  # a union such as IntOrString
            return
        for key, item in value.items():
            inner_path = f"{path}.{key}" if path else str(key)
            if key not in known:
                yield f"{inner_path}: unknown field"
            else:
                kind = _without_none(known[key].annotation)
                yield from _unknown_fields(item, kind, inner_path)


def _without_none(annotation: Any) -> Any:
    from typing import Union, get_args, get_origin

    if get_origin(annotation) is Union:
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return inner[0] if len(inner) == 1 else annotation
    return annotation
