"""CSV files as runs: finals and curves of any origin, W&B's own exports, and what is refused in one line."""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

import console
from gacha import csv_source


def written(folder: Path, text: str, name: str = "pulls.csv") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_finals_are_a_pull_a_row(tmp_path: Path) -> None:
    """Verdicts by value; the same pull names in two recipes; costs by our names; settings as numbers and text."""
    path = written(
        tmp_path,
        "dir,seed,lr,optimizer,train_time_s,final_val_loss\n"
        "muon,0,3e-4,いつも,61.5,3.28\nmuon,1,3e-4,いつも,60,nan\nadam,0,1e-3,x,59,\nadam,1,1e-3,x,58,3.5\nadam,2,1e-3,x,9,-inf\n",
    )
    first, *rest = found = csv_source.read(path)
    assert [run.status for run in found] == ["ok", "diverged", "crashed", "ok", "diverged"]
    assert [run.group for run in found] == ["muon", "muon", "adam", "adam", "adam"] and len({r.id for r in found}) == 5
    assert first.config == {"recipe": "muon", "dir": "muon", "seed": 0, "lr": 3e-4, "optimizer": "いつも"}
    assert first.summary == {"cost/device_seconds": 61.5, "final_val_loss": 3.28, "status": "ok"}
    assert "final_val_loss" not in rest[1].summary and csv_source.value_column(path) == "final_val_loss"
    assert all(run.history == {} and run.job_type == "pretrain" for run in found)


def test_by_and_value_choose_other_columns(tmp_path: Path) -> None:
    path = written(tmp_path, "group,run,model,val_loss,err_sub\na,1,big,3.0,0.4\na,2,small,3.1,0.5\n")
    one, two = csv_source.read(path, by="model", value="err_sub")
    assert (one.group, one.config["recipe"], one.summary["err_sub"]) == ("big", "big", 0.4) and two.group == "small"
    assert one.config["val_loss"] == 3.0 and one.config["group"] == "a"


def test_curves_are_sorted_and_end_with_their_last_result(tmp_path: Path) -> None:
    """Rows of two pulls mixed and out of order; val_loss in some rows only; a pull that ends in NaN; one without."""
    rows = [
        f"r,{run},{step},{step * 512},{5 - step / 10 + run},{'' if step % 2 else 4 - step / 10},0.1"
        for step in range(6)
        for run in (0, 1)
    ]
    rows += ["r,2,0,0,5,4,0.1", "r,2,2,1024,nan,nan,0.1", "r,3,0,0,5,,0.2"]
    path = written(tmp_path, "recipe,seed,step,tokens,loss,val_loss,lr\n" + "\n".join(reversed(rows)))
    runs = {run.config["seed"]: run for run in csv_source.read(path)}
    loss, val = runs[0].history["loss"], runs[0].history["val_loss"]
    assert loss.step.tolist() == [0, 1, 2, 3, 4, 5] and loss.tokens.tolist() == [0, 512, 1024, 1536, 2048, 2560]
    np.testing.assert_allclose(val.value, [4.0, 3.8, 3.6])
    assert val.step.tolist() == [0, 2, 4] and val.tokens.tolist() == [0, 1024, 2048]
    assert runs[0].summary == {"tokens": 2560, "val_loss": 3.6, "status": "ok"} and runs[0].config["lr"] == 0.1
    assert [runs[seed].status for seed in (1, 2, 3)] == ["ok", "diverged", "crashed"]
    assert math.isnan(runs[2].summary["val_loss"]) and "lr" not in runs[0].history


def test_a_lone_curve_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "one.csv.gz"
    path.write_bytes(gzip.compress("\ufeffiteration\tloss\r\n10\t3.5\r\n\r\n20\t3.25\r\n".encode()))
    (run,) = csv_source.read(str(path))
    assert (run.name, run.group, run.summary["loss"]) == ("one", "one", 3.25)
    assert run.history["loss"].step.tolist() == [10, 20] and np.isnan(run.history["loss"].tokens).all()


def test_a_table_of_runs_as_wandb_exports_it(tmp_path: Path) -> None:
    """A line break within a quoted note; states; seeds told apart from the recipe in our own runs' names."""
    head = '"Name","State","Notes","User","Tags","Created","Runtime","Sweep","lr","seed","val/bpb","val/loss"\n'
    row = '"{}","{}","two\nlines","me","a, b","2026-11-01T10:00:00.000Z","{}","","0.003","{}","{}","{}"\n'
    rows = [
        ("3f9c-s0", "finished", 60, 0, 1.2, 2.9),
        ("3f9c-s1", "failed", 9, 1, 1.9, 3.9),
        ("b4-s0", "killed", 5, 0, "", ""),
    ]
    found = csv_source.read(written(tmp_path, head + "".join(row.format(*values) for values in rows)))
    assert [(run.name, run.group, run.status) for run in found] == [
        ("3f9c-s0", "3f9c", "ok"),
        ("3f9c-s1", "3f9c", "crashed"),
        ("b4-s0", "b4", "stopped"),
    ]
    assert found[0].summary == {"cost/device_seconds": 60, "val/bpb": 1.2, "status": "ok"}
    assert found[0].config == {"recipe": "3f9c", "lr": 0.003, "seed": 0, "val/loss": 2.9}


def test_a_chart_as_wandb_exports_it(tmp_path: Path) -> None:
    head = ",".join(
        f'"{run} - {key}{end}"'
        for run in ("ab-s0", "a - b")
        for key in ("_step", "val/loss")
        for end in ("", "__MIN", "__MAX")
    )
    text = f'"tokens",{head}\n' + "0,0,0,0,3.5,3.5,3.5,,,,,,\n" + "512,1,1,1,3.25,3.25,3.25,1,1,1,3.0,3.0,3.0\n"
    first, second = csv_source.read(written(tmp_path, text))
    assert (first.name, second.name, second.group) == ("ab-s0", "a - b", "pulls")
    assert first.history.keys() == {"val/loss"} and first.history["val/loss"].value.tolist() == [3.5, 3.25]
    assert first.history["val/loss"].tokens.tolist() == [0, 512] and second.history["val/loss"].tokens.tolist() == [512]


def test_most_pulls_are_kept_when_one_name_stands_for_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that is there twice does no harm; two different ones at a step do, and their pull is left out."""
    rows = [f"{run},{step},{3 - step}" for run in "abc" for step in (0, 1)] + ["a,1,2", "b,1,7"]
    found = csv_source.read(written(tmp_path, "run,step,loss\n" + "\n".join(rows)))
    assert [(run.name, run.history["loss"].value.tolist()) for run in found] == [("a", [3, 2]), ("c", [3, 2])]
    said = capsys.readouterr().err
    assert "'b' has two rows of one step (lines 5 and 9): left out" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "pulls.csv: is empty"),
        ("run,loss\n", "pulls.csv: holds no rows"),
        ("run,note\na,b\n", "no column holds results in numbers; there are run, note"),
        ("run,loss_a,loss_b\na,1,2\n", "Choose with --value: loss_a, loss_b"),
        ("run,x,y\na,1,2\n", "Choose with --value: x, y"),
        ("run,loss\na,1\nb,oops\n", "pulls.csv:3: 'oops' in column 'loss' is no number"),
        ("run,loss\na,1\nb\n", "pulls.csv:3: 1 fields where the header has 2"),
        ("run,loss,loss\na,1,2\n", "two columns are named 'loss'"),
        ("recipe,run,loss\nr,a,1\nr,a,2\n", "pulls.csv:3: run 'a' comes again (first in line 2)"),
        ("run,step,loss\na,0,1\na,,2\n", "pulls.csv:3: no whole number in column 'step'"),
        (
            "run,step,loss\na,0,1\na,0,2\n",
            "'a' has two rows of one step (lines 2 and 3): give each pull a name of its own",
        ),
        ("step,loss\n0,1\n0,2\n", "two rows of one step"),
    ],
)
def test_what_is_not_clear_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(console.UserError) as refused:
        csv_source.read(written(tmp_path, text))
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_flag_that_names_no_column_gets_the_choices(tmp_path: Path) -> None:
    path = written(tmp_path, "run,loss\na,1\n")
    with pytest.raises(console.UserError, match=r"--by recipe: no such column in .*; there are run, loss"):
        csv_source.read(path, by="recipe")
    with pytest.raises(console.UserError, match="--value bpb: no such column"):
        csv_source.read(path, value="bpb")
    (tmp_path / "sjis.csv").write_bytes("名前,loss\n".encode("cp932"))
    with pytest.raises(console.UserError, match="is not UTF-8"):
        csv_source.read(str(tmp_path / "sjis.csv"))
    with pytest.raises(console.UserError, match="No such file"):
        csv_source.read(str(tmp_path / "none.csv"))
