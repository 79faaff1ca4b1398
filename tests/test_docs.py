"""README and docs: every key, metric, file, folder and test they name exists, commands parse."""

import inspect
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl.trainer import kto_trainer
from trl.trainer.kto_config import KTOConfig

from docs.hooks import key_tables
from docs.keys import keys
from kto_lightning.training.metrics_csv import COLUMNS
from tests.support.cli import run_cli, small_data, small_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in [*PAGES, ROOT / "README.md"]}
INHERITED = re.findall(
    r"\w+",
    """
    output_dir per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
    learning_rate lr_scheduler_type warmup_steps warmup_ratio weight_decay max_grad_norm optim
    adam_beta1 adam_beta2 adam_epsilon num_train_epochs max_steps bf16 fp16 gradient_checkpointing
    save_steps save_strategy save_total_limit logging_steps report_to run_name eval_strategy
    eval_steps seed data_seed resume_from_checkpoint deepspeed fsdp use_liger_kernel torch_compile
    dataloader_num_workers dataloader_drop_last load_best_model_at_end push_to_hub use_cpu
    disable_tqdm train_sampling_strategy
""",
)
LOGGED_BY_TRAINER = {"loss", "grad_norm", "learning_rate"}


@pytest.fixture(scope="module")
def known() -> set[str]:
    return {key.name for key in keys()}


def first_column(page: str) -> set[str]:
    """All names in backticks in the first column of a page's tables."""
    cells = re.findall(r"^\| (.*?) \|", TEXTS[page], re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_key_of_kto_config_has_a_row():
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(KTOConfig)} - inherited
    changed = set(KTOConfig.__annotations__)
    assert {"beta", "sync_ref_model"} <= own
    assert "learning_rate" in changed
    assert (own | changed | set(INHERITED)) - first_column("coming_from_trl") == set()


def test_no_key_has_two_rows():
    rows = re.findall(r"^\| `(\w+)`", TEXTS["coming_from_trl"], re.MULTILINE)
    keys = set(KTOConfig.__dataclass_fields__)
    found = [row for row in rows if row in keys and row not in LOGGED_BY_TRAINER]
    assert len(found) == len(set(found)) > 40


def test_every_config_is_on_the_page_of_configs():
    assert all(path.name in TEXTS["configs"] for path in (ROOT / "configs").iterdir())


def test_every_metric_of_trl_has_a_row():
    logged = set(re.findall(r'_metrics\[mode\]\["([^"]+)"\]', inspect.getsource(kto_trainer)))
    assert {"kl", "rewards/chosen", "entropy"} <= logged
    assert (logged | LOGGED_BY_TRAINER) - first_column("coming_from_trl") == set()


@pytest.mark.parametrize("page", TEXTS)
def test_every_key_that_a_page_names_exists(page: str, known: set[str]):
    named = set(
        re.findall(
            r"--((?:model|data|trainer|checkpoint|report)\.[a-z_0-9.]*[a-z_0-9])", TEXTS[page]
        )
    )
    through = {name for name in named if name.startswith(("trainer.logger.", "trainer.strategy."))}
    assert named - through - known == set()


@pytest.mark.parametrize("page", TEXTS)
def test_every_metric_that_a_page_names_exists(page: str):
    named = set(re.findall(r"\b(?:train|val)/[a-z_0-9/]*[a-z_0-9]", TEXTS[page]))
    groups = {column.rpartition("/")[0] for column in COLUMNS}  # `train/gradient_left/…`
    assert named - set(COLUMNS) - groups == set()


def test_every_metric_is_on_the_page_of_metrics():
    assert set(COLUMNS) - first_column("metrics") == set()


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_and_test_that_a_page_names_exists(page: str):
    pattern = r"\b((?:tests|benchmarks|configs|kto_lightning)/[\w/]+\.(?:py|yaml|md))(?:::(\w+))?"
    for path, function in re.findall(pattern, TEXTS[page]):
        assert (ROOT / path).is_file(), path
        if function:
            assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), function
    package = ROOT / "kto_lightning"
    rooms = "|".join(path.parent.name for path in package.glob("*/__init__.py"))
    for path in re.findall(rf"`((?:{rooms})/[\w/]+\.py)`", TEXTS[page]):
        assert (package / path).is_file(), path


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_programs_of_the_page_on_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    programs = re.findall(r"^```python\n(.*?)```", TEXTS["api"], re.DOTALL | re.MULTILINE)
    assert len(programs) == 3
    small_model(tmp_path / "model")
    small_data(tmp_path / "feedback.jsonl")
    monkeypatch.chdir(tmp_path)
    for program in programs:
        exec(program.replace("Qwen/Qwen2.5-0.5B-Instruct", "model"), {})
        assert AutoModelForCausalLM.from_pretrained("aligned").config.model_type == "qwen2"
        assert AutoTokenizer.from_pretrained("aligned")
        shutil.rmtree("aligned")


def test_the_readme_has_a_tree_of_every_folder():
    (block,) = re.findall(
        r"^```\n(kto_lightning/\n.*?)```", TEXTS["README"], re.DOTALL | re.MULTILINE
    )
    paths, parents = set(), [""]
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        if depth < len(parents):  # else the second line of a description
            parents = [*parents[: depth + 1], parents[depth] + line.split()[0]]
            paths.add(parents[-1])
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    rooms = {path.parent.name for path in (ROOT / "kto_lightning").glob("*/__init__.py")}
    assert {f"kto_lightning/{room}/" for room in rooms} <= paths
    assert {"kernels/kto_kernels/", "docs/", "configs/", "notebooks/", "benchmarks/"} <= paths
    of_tests = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert of_tests <= set(re.findall(r"\w+", block.partition("\ntests/")[2]))


def commands() -> list[list[str]]:
    """All `fit`, `validate` and `predict` commands in the pages' code, on one line or several."""
    found = []
    for text in TEXTS.values():
        for block in re.findall(r"```(?:bash|console)\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                _, is_ours, rest = line.partition("-m kto_lightning ")
                words = shlex.split(rest.rstrip(" …"), comments=True) if is_ours else []
                if words and words[0] in ("fit", "validate", "predict"):
                    found.append(words)
    return found


def test_every_command_parses(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(commands()) >= 5
    for words in commands():
        given = [] if "--model.policy" in words else ["--model.policy", "some/model"]
        status = run_cli(words[0], *given, *words[1:], "--print_config")
        assert status == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"


def test_the_page_of_keys_has_every_key(known: set[str]):
    rows = set(re.findall(r"^\| `--([^`]+)` \|", key_tables(), re.MULTILINE))
    assert rows == known
    assert {"model.beta", "model.lora.r", "data.batch_size", "trainer.max_steps"} <= rows
    assert {"output_dir", "seed_everything", "ckpt_path", "config"} <= rows


def test_every_key_says_what_it_means():
    assert [key.name for key in keys() if not key.meaning] == []
