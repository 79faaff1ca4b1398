"""The package's public names, its dependencies, and a short run under a plain Lightning Trainer."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import lightning
import pytest
import torch
import transformers.utils.import_utils as transformers_imports
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kto_kernels
import kto_lightning
from kto_lightning import KTODataModule, KTOModule, kto_loss, reference_point
from kto_lightning.errors import ConfigError
from tests.support.factories import make_tokenizer, plain_records, save_model, write_jsonl

PUBLIC = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (kto_lightning, kto_kernels)
    for name in package.__all__
}


ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {"trl", "bitsandbytes", "triton"}
"""Imported by `parity`, for QLoRA, and on CUDA, where torch brings it."""


def own_members(kind: type) -> dict[str, Callable]:
    """The public methods that a class itself defines."""
    members = {name: inspect.unwrap(value) for name, value in vars(kind).items() if callable(value)}
    return {name: value for name, value in members.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_documented(name):
    thing = PUBLIC[name]
    assert thing.__doc__
    if inspect.isclass(thing):
        for member, value in own_members(thing).items():
            # Lightning's hooks are documented by Lightning.
            assert value.__doc__ or hasattr(thing.__mro__[1], member), f"{name}.{member}"
    documented = thing.__doc__ + inspect.getsource(thing)
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"^ *{parameter}: ", documented, re.MULTILINE), f"{name}: {parameter}"


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_typed(name):
    thing = PUBLIC[name]
    functions = own_members(thing) if inspect.isclass(thing) else {"": thing}
    if inspect.isclass(thing):
        functions["__init__"] = thing.__init__
    for member, function in functions.items():
        signature = inspect.signature(function)
        untyped = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty and parameter.name != "self"
        ]
        assert not untyped, f"{name}.{member}: {untyped}"
        assert signature.return_annotation is not signature.empty, f"{name}.{member}"
    package = Path(str(sys.modules[name.split(".")[0]].__file__)).parent
    assert (package / "py.typed").is_file()


def test_importing_the_package_imports_no_framework():
    heavy = "torch", "transformers", "lightning", "datasets"
    code = f"import sys, kto_lightning; print([n for n in {heavy} if n in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def base_distributions() -> set[str]:
    """All that `pip install kto-lightning` brings, by canonical name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    found: dict[str, set[str]] = {}
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        if extras <= found.get(name, set()):
            continue
        found[name] = found.get(name, set()) | extras
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(needed)
    return set(found)


def imported_modules() -> Iterator[tuple[str, str]]:
    """Every file of both packages with each top-level module it imports, at whatever place."""
    for folder in (ROOT / "kto_lightning", ROOT / "kernels" / "kto_kernels"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                else:
                    continue
                yield from ((path.relative_to(ROOT).as_posix(), n.split(".")[0]) for n in names)


def test_the_packages_import_base_dependencies_alone():
    """`make demo` installs nothing else, and the development environment would hide it."""
    own = {*sys.stdlib_module_names, "kto_lightning", "kto_kernels", *OPTIONAL}
    base, provided_by = base_distributions(), metadata.packages_distributions()
    assert {"torch", "matplotlib", "docstring-parser"} <= base
    assert {"trl", "pytest", "mkdocs"} & base == set()
    undeclared = [
        (path, module)
        for path, module in imported_modules()
        if module not in own
        and not base & {canonicalize_name(name) for name in provided_by.get(module, [])}
    ]
    assert undeclared == []


def test_transformers_does_not_take_our_kernels_folder_for_its_kernels_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not transformers_imports.is_kernels_available()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_trainer_runs_the_module_and_the_data_module(tmp_path):
    save_model(tmp_path / "model", "llama", make_tokenizer())
    records = write_jsonl(tmp_path / "records.jsonl", plain_records(12))
    module = KTOModule(policy=str(tmp_path / "model"), learning_rate=1e-3)
    data = KTODataModule(train=str(records), batch_size=4)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert module.published.latest["train/grad_norm"] > 0


def make_trainer(tmp_path, **settings):
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    own = {"accelerator": "cpu", "max_steps": 1, "default_root_dir": tmp_path}
    return lightning.Trainer(**quiet, **own, **settings)


def test_a_trainer_without_our_data_module_is_refused(tmp_path):
    """Refused before the model is loaded: there is none of this name."""
    trainer = make_trainer(tmp_path)
    with pytest.raises(
        ConfigError, match=r"Give the trainer one: trainer.fit\(module, datamodule="
    ):
        trainer.fit(KTOModule("absent"), train_dataloaders=[1, 2], val_dataloaders=[3])


def test_a_data_module_without_a_trainer_is_refused(tmp_path):
    records = write_jsonl(tmp_path / "records.jsonl", plain_records(12))
    data = KTODataModule(train=str(records))
    data.prepare_data()
    with pytest.raises(
        ConfigError, match=r"Give it to a trainer: trainer.fit\(module, datamodule="
    ):
        data.setup("fit")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_trainer_with_an_unsuitable_precision_is_refused(precision, tmp_path):
    records = write_jsonl(tmp_path / "records.jsonl", plain_records(12))
    save_model(tmp_path / "model", "llama", make_tokenizer())
    module = KTOModule(str(tmp_path / "model"))
    trainer = make_trainer(tmp_path, precision=precision)
    with pytest.raises(ConfigError, match=f"precision {precision} .* Use bf16-mixed or 32-true"):
        trainer.fit(module, datamodule=KTODataModule(train=str(records)))


def test_the_loss_works_on_plain_tensors():
    z0 = reference_point(torch.tensor(3.0), 2)
    losses = kto_loss(torch.tensor([1.5, 1.5]), torch.tensor([True, False]), z0, beta=0.1)
    assert losses.tolist() == [0.5, 0.5]
