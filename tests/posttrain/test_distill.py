"""`train.py distill` on models of two layers: a teacher's answers, its probabilities, and students of fewer layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import console
from gacha import runs
from posttrain import distill, models, sft, stage
from posttrain.local_teacher import LocalModel
from tests.posttrain import small_task
from tests.posttrain.small_task import Trained

Distil = Callable[..., Trained]
Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return small_task.write(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def teacher(llama: Any, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught the small task; do not change it."""
    flags = {"model": llama.checkpoint, "data": files[0], "max_steps": 120, "schedule": "linear"}
    return small_task.train(sft.main, tmp_path_factory.mktemp("teacher"), **flags).folder


@pytest.fixture(scope="module")
def tune(llama: Any, teacher: Path, files: Files) -> Distil:
    """tune(out, **flags): one run of the distillation door, from the base to the teacher's answers."""
    flags = {"model": llama.checkpoint, "teacher": teacher, "data": files[1], "schedule": "linear"}
    return lambda out, **more: small_task.train(distill.main, out, **{**flags, **more})


def answers_of(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_student_learns_what_the_teacher_answers(
    tune: Distil, tmp_path: Path, files: Files, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tune(tmp_path, offline=True, max_steps=100, test_data=files[1])
    assert run.code == 0 and run.result["eval_before/exact_match"] == 0 and run.result["eval/exact_match"] >= 0.5
    said = answers_of(run.folder)
    assert len(said) == len(small_task.items())
    monkeypatch.setattr(LocalModel, "answer", lambda *_: pytest.fail("the teacher is asked again"))
    (run.folder / "result.json").unlink()
    again = tune(tmp_path, offline=True, max_steps=100, test_data=files[1])
    assert again.weights == run.weights, "killed before its end, it asks nothing twice"
    [recorded] = runs.read(tmp_path)
    assert recorded.job_type == "distill" and recorded.summary["data/rows"] == len(said)
    assert recorded.summary["lineage/teacher"] == stage.model_fingerprint(models.find(str(teacher)))


def test_several_answers_are_drawn_and_only_right_ones_kept(
    tune: Distil, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = {"teacher_samples": 3, "teacher_temperature": 1.0, "epochs": 1}
    everything = tune(tmp_path / "all", **drawn)
    said = answers_of(everything.folder)
    assert len(said) == 3 * len(small_task.items()) and len(set(said)) > len(small_task.KINDS)
    capsys.readouterr()
    right = tune(tmp_path / "exact", keep="exact", **drawn)
    assert "answer_not_exact" in capsys.readouterr().err
    assert right.result["step"] < everything.result["step"], "an epoch is over what is learned from"
    assert answers_of(right.folder) == said, "the same seed, the same draws"
    other = tune(tmp_path / "other", seed=1, **drawn)
    assert answers_of(other.folder) != said


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tune: Distil, tmp_path: Path, teacher: Path) -> None:
    run = tune(tmp_path, offline=True, model=teacher, method="logits", max_steps=3)
    assert run.code == 0
    [recorded] = runs.read(tmp_path)
    assert abs(recorded.history["train/loss"].value).max() < 1e-6
    assert set(recorded.history) >= {"policy/length", "policy/clipped", "policy/entropy"}


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_probabilities_teach_a_student(tune: Distil, tmp_path: Path, teacher: Path, files: Files, beta: float) -> None:
    """From one layer of the teacher's two to half of what it knows and more, on the student's own answers."""
    flags = {"model": teacher, "layers": 1, "method": "logits", "beta": beta, "test_data": files[1], "batch_size": 8}
    run = tune(tmp_path, offline=True, max_steps=40, **flags)
    loss = runs.read(tmp_path)[0].history["train/loss"].value
    assert loss[-10:].mean() < loss[:5].mean() / 2
    assert run.result["eval/field_accuracy"] > run.result["eval_before/field_accuracy"]
    tuned, _ = models.load(run.folder / "model")
    assert tuned.config.num_hidden_layers == 1


def test_layers_are_evenly_chosen_and_the_student_reloads(tune: Distil, tmp_path: Path, teacher: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    old = list(model.model.layers)
    student = distill.with_layers(model, 3)
    assert [layer is old[i] for layer, i in zip(student.model.layers, (0, 2, 4), strict=True)] == [True] * 3
    assert config.num_hidden_layers == 6, "the teacher's own configuration is as it was"
    student.save_pretrained(tmp_path / "student")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "student").eval()
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(student(ids, use_cache=False).logits, again(ids, use_cache=False).logits)
    cached = student.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    assert torch.equal(
        cached, student.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
    )
    with pytest.raises(console.UserError, match="--layers 3: the model has 2"):
        tune(tmp_path, model=teacher, layers=3)


def test_an_adapter_teaches_by_its_probabilities_and_once_merged_by_its_answers(
    tune: Distil, tmp_path: Path, llama: Any, files: Files
) -> None:
    flags = {"model": llama.checkpoint, "data": files[0], "max_steps": 1, "lora_rank": 2}
    adapter = small_task.train(sft.main, tmp_path / "adapter", **flags).folder
    assert tune(tmp_path, teacher=adapter, method="logits", max_steps=1).code == 0
    with pytest.raises(console.UserError, match="is an adapter: merge it first"):
        tune(tmp_path, teacher=adapter)


def test_random_weights_are_the_control(tune: Distil, tmp_path: Path) -> None:
    tuned, control = tune(tmp_path, max_steps=1), tune(tmp_path, max_steps=1, random_weights=True)
    assert tuned.folder != control.folder and tuned.weights != control.weights


def test_vocabularies_and_templates_must_be_one_for_probabilities(tune: Distil, tmp_path: Path, teacher: Path) -> None:
    model, tokenizer = models.load(models.find(str(teacher)))
    tokenizer.chat_template = tokenizer.chat_template.replace("【指示】", "【質問】").replace("指示", "質問")
    stage.save_model(model, tokenizer, tmp_path / "asks")
    with pytest.raises(console.UserError, match="its chat template is not that of"):
        tune(tmp_path, teacher=tmp_path / "asks", method="logits")
    tokenizer.add_tokens(["新語"])
    model.resize_token_embeddings(len(tokenizer))
    stage.save_model(model, tokenizer, tmp_path / "words")
    with pytest.raises(console.UserError, match="its vocabulary is not that of"):
        tune(tmp_path, teacher=tmp_path / "words", method="logits")
    assert tune(tmp_path, teacher=tmp_path / "words", max_steps=1).code == 0, "answers need no common vocabulary"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"teacher": "nowhere"}, "--teacher nowhere: no such model"),
        ({"method": "logits", "teacher": "http://127.0.0.1:9"}, "an endpoint has no logits"),
        ({"teacher_samples": 2}, "--teacher_temperature 0.0: must be"),
        ({"teacher": "BASE"}, "has no chat template, so it was never taught to answer"),
        ({"beta": 2}, "--beta 2.0: must be from 0 to 1"),
        ({"keep": "exact", "data": "CHATS"}, "have no reference to score answers by"),
        ({"max_length": 4}, "no prompt fits in --max_length 4"),
        ({"max_new_tokens": 1}, "no answer to learn from"),
    ],
)
def test_mistakes_are_one_line(
    tune: Distil, tmp_path: Path, files: Files, llama: Any, flags: dict[str, Any], said: str
) -> None:
    known = {"CHATS": files[0], "BASE": llama.checkpoint}
    with pytest.raises(console.UserError) as mistake:
        tune(tmp_path, **{name: known.get(value, value) for name, value in flags.items()})
    assert said in str(mistake.value) and "\n" not in str(mistake.value)


def test_prompts_are_conversations_before_their_last_answer(files: Files) -> None:
    from posttrain.rows import load_rows

    prompts, references = distill.prompts_of(load_rows(str(files[0])))
    assert [one[-1]["role"] for one in prompts] == ["user"] * len(small_task.items()) and set(references) == {None}
    assert prompts == distill.prompts_of(load_rows(str(files[1])))[0]
