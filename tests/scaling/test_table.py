"""What a table says is read as it is said, and what it cannot mean is refused with its row."""

import json

import numpy as np
import pytest

from gptjax.config import Config, ModelConfig, OptimizerConfig
from gptjax.errors import UserError
from gptjax.scaling.findings import examine, extrapolations, frontiers, to_json
from gptjax.scaling.laws import EPOCH, counted_parameters
from gptjax.scaling.optima import frontier_of, isoflop_valleys, power_law, tuning_law, tuning_valleys
from gptjax.scaling.table import Table, best_tuned, read, read_runs, read_table
from gptjax.training.run_dir import save_config


@pytest.fixture
def table(tmp_path):
    def write(text, **options):
        (tmp_path / "a.csv").write_text(text, encoding="utf-8")
        return read_table(tmp_path / "a.csv", **options)

    return write


def test_columns_by_name_and_by_another_name(table):
    found = table("val,parameters,tokens\n3.5,1e6,2e7\n3.4,2000000,2e7\n", columns={"loss": "val"})
    assert found.loss_P.tolist() == [3.5, 3.4]
    assert found.parameters_P.tolist() == [1e6, 2e6]
    assert found.more["flops"].tolist() == [1.2e14, 2.4e14], "6 N D where it is not given"
    assert found.names == ("row 2", "row 3")


def test_flops_stand_for_either(table):
    assert table("flops,tokens,loss\n6e14,1e8,3\n").parameters_P.tolist() == [1e6]
    assert table("parameters,flops,loss\n1e6,6e14,3\n").tokens_P.tolist() == [1e8]


def test_diverged_and_unfinished_rows_are_left_out_and_listed(table):
    found = table(
        "run,parameters,tokens,loss,status\na,1e6,1e7,3,finished\nb,1e6,1e7,nan,finished\nc,,,,diverged\nd,1,1,inf,\n"
    )
    assert found.names == ("a",)
    assert found.excluded == ("row 3: diverged, loss nan", "row 4: diverged", "row 5: diverged, loss inf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters,tokens,loss\n1,2,3\n1,,3\n2,1,3\n", "tokens is missing or not a positive number in row 3"),
        (
            "parameters,tokens,loss\n1,2,3\n-1,2,3\n0,1,3\n",
            "parameters is missing or not a positive number in rows 3, 4",
        ),
        ("parameters,tokens,loss\n1,2,\n", "loss is missing or not a positive number in row 2"),
        ("parameters,tokens,loss\n1,2,three\n", "loss is missing or not a positive number in row 2"),
        ("parameters,tokens\n1,2\n", "no column loss; it has parameters, tokens"),
        ("parameters,loss\n1,2\n", "no column tokens.*Needed are loss and two of"),
        ("flops,loss\n1,2\n", "no column parameters and tokens"),
        ("parameters,tokens,loss\n", "no rows"),
    ],
)
def test_rows_and_columns_that_are_wrong(table, text, message):
    with pytest.raises(UserError, match=message):
        table(text)


def test_names_of_columns_that_are_wrong(table):
    with pytest.raises(UserError, match=r"no column .'x'.; it has parameters"):
        table("parameters,tokens,loss\n1,2,3\n", columns={"loss": "x"})
    with pytest.raises(UserError, match="what can be read is parameters"):
        table("parameters,tokens,loss\n1,2,3\n", columns={"lose": "loss"})


def a_run(folder, summary, **model):
    folder.mkdir(parents=True)
    model = {"num_layers": 1, "model_dim": 32, "num_heads": 2, "vocab_size": 64} | model
    config = Config(model=ModelConfig(**model), optimizer=OptimizerConfig(peak_learning_rate=0.25))
    save_config(folder, config, {})
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps({"tokens": 640, "step": 5, **summary}), encoding="utf-8")
    return config


def test_runs_and_studies(tmp_path):
    config = a_run(tmp_path / "s/runs/a", {"stopped": "finished", "val_loss": 3.0})
    a_run(tmp_path / "s/runs/b", {"stopped": "diverged", "val_loss": 9.0})
    a_run(tmp_path / "s/runs/c", {"stopped": "finished", "val_loss": 2.5}, parametrization="mup")
    card = {"counts": "non_embedding", "runs": dict.fromkeys("abcd")}
    (tmp_path / "s/study.json").write_text(json.dumps(card), encoding="utf-8")
    found = read_runs([tmp_path / "s"])
    assert found.names == ("a", "c")
    assert found.excluded[:2] == ("b: diverged", "d: not trained yet")
    assert "parametrizations are mixed: mup, standard" in found.excluded[2]
    assert found.counts == "non_embedding"
    assert found.parameters_P[0] == counted_parameters(config.model, "non_embedding")
    assert found.more["learning_rate"].tolist() == [0.25, 0.25]
    assert found.more["batch_tokens"][0] == config.training.batch_size * config.model.context_length
    (tmp_path / "s/results.csv").write_text("parameters,tokens,loss\n1,2,3\n", encoding="utf-8")
    assert read([str(tmp_path / "s/results.csv")], {}, None).counts == "non_embedding", "as the study beside it says"
    alone = read_runs([tmp_path / "s/runs/a"], where={"model.parametrization": "standard"})
    assert (alone.counts, alone.names) == ("non_embedding_and_head", ("a",))
    for where, message in (
        ({"model.size": "1"}, "is no field"),
        ({"model.model_dim": "7"}, "model_dim 7 has finished"),
    ):
        with pytest.raises(UserError, match=message):
            read_runs([tmp_path / "s"], where=where)
    with pytest.raises(UserError, match=r"neither a run, a study's folder nor a .csv table"):
        read([str(tmp_path)], {}, None)
    with pytest.raises(UserError, match="counts all is not one of total"):
        read([str(tmp_path)], {}, "all")


def rows(N, D, loss, **more):
    arrays = {name: np.array(column, float) for name, column in more.items()}
    N, D, loss = (np.array(column, float) for column in (N, D, loss))
    arrays.setdefault("flops", 6 * N * D)
    return Table("made", "total", tuple(f"r{i}" for i in range(len(N))), N, D, loss, arrays)


def test_of_runs_that_differ_in_tuning_the_best_counts():
    found = best_tuned(
        rows([1, 1, 1, 2, 2], [5] * 5, [3.0, 2.0, 2.1, 4.0, 4.5], learning_rate=[0.1, 0.2, 0.2, 0.1, 0.1])
    )
    assert found.names == ("r1", "r2", "r3", "r4"), "other seeds of the best rate stay"
    assert found.excluded == ("1 runs of other learning rates or batches than the best of their size and tokens",)


def isoflop(budgets=(1e18, 1e19, 1e20)):
    N, D = [], []
    for C in budgets:
        best, _ = EPOCH.compute_optimal(C)
        N += [best * factor for factor in (0.3, 0.55, 1, 1.8, 3.3)]
        D += [C / 6 / n * 1.02 for n in N[-5:]]
    return rows(N, D, [EPOCH.loss(n, d) for n, d in zip(N, D, strict=True)])


def test_parabolas_find_the_frontier():
    valleys = isoflop_valleys(isoflop())
    assert [len(valley.x) for valley in valleys] == [5, 5, 5]
    law, tokens = frontier_of(valleys)
    assert tokens(1e19) == pytest.approx(1.02 * 1e19 / 6 / law(1e19), rel=0.03)
    assert law.exponents[0] == pytest.approx(EPOCH.frontier_exponent, abs=0.002)
    assert law(1e19) == pytest.approx(EPOCH.compute_optimal(1e19)[0], rel=0.1)
    # A frontier needs minima that lie inside what was tried.
    falling = rows([1, 2, 4], [4, 2, 1], [3.0, 2.0, 1.5])
    assert [valley.best for valley in isoflop_valleys(falling)] == [None]


@pytest.mark.parametrize("edge", [0, -1])
def test_other_seeds_of_the_best_size_do_not_move_it_inside(edge):
    """The edge is a size: of its runs the best need not be the first or the last of the table."""
    N, loss = np.array([1.0, 2, 4, 8]), np.array([3.0, 3.005, 3.02, 3.06])[:: 1 if edge == 0 else -1]
    for worse in (0.004, 0.0, -0.004):
        again_N, again = [*N, N[edge]], [*loss, loss[edge] + worse]
        table = rows(again_N, [8 / n for n in again_N], again)
        assert [valley.best for valley in isoflop_valleys(table)] == [None]


def test_tokens_of_the_frontier_are_those_of_the_runs():
    """A study's FLOPs are more than 6 N D, for they have attention and head; then no tokens are C / (6 N)."""
    table = isoflop()
    table.more["flops"][:] = 1.5 * 6 * table.parameters_P * table.tokens_P
    found = examine(table, resamples=0)
    C = float(table.more["flops"][5])
    (at,) = next(row["optima"] for row in frontiers(found, [C]) if row["name"] == "isoFLOP parabolas")
    assert 1.5 * 6 * at["parameters"] * at["tokens"] == pytest.approx(C, rel=1e-3)


def test_the_best_rate_and_its_law():
    N, D, rate, loss = [], [], [], []
    for n in (1e6, 4e6, 16e6):
        for d in (1e8, 4e8):
            for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
                best = 3 * n**-0.5 * d**0.25
                N.append(n), D.append(d), rate.append(1.3 * best * factor)
                loss.append(3 + 0.1 * np.log(1.3 * factor) ** 2)
    valleys = tuning_valleys(rows(N, D, loss, learning_rate=rate), "learning_rate")
    assert [valley.best for valley in valleys] == pytest.approx(
        [3 * n**-0.5 * d**0.25 for n, d in (v.at for v in valleys)]
    )
    law, names = tuning_law(valleys)
    assert names == ("parameters", "tokens")
    assert (law.coefficient, *law.exponents) == pytest.approx((3, -0.5, 0.25))
    assert tuning_valleys(rows(N, D, loss), "batch_tokens") == []
    edge = tuning_valleys(rows([1] * 3, [1] * 3, [1, 2, 3], learning_rate=[1, 2, 4]), "learning_rate")
    assert edge[0].best is None
    assert tuning_law(edge) is None
    with pytest.raises(UserError, match="2 minima are fewer than the 3"):
        power_law(np.ones((2, 2)), np.ones(2))


def test_findings_hold_out_extrapolate_and_become_json():
    table = isoflop()
    found = examine(table, hold_out_above=float(np.median(table.parameters_P)), resamples=30)
    assert len(found.held_out.names) == 7
    assert all(abs(row["error"]) < 1e-3 and row["warning"] for row in extrapolations(found))
    (asked,) = [row for row in extrapolations(found, [(7e10, 1.4e12)]) if row["measured"] is None]
    assert asked["loss"] == pytest.approx(EPOCH.loss(7e10, 1.4e12), rel=1e-3)
    names = [row["name"] for row in frontiers(found, [1e21])]
    assert names == ["this fit", "isoFLOP parabolas", "Kaplan", "Chinchilla 1", "Chinchilla 2", "Chinchilla 3", "Epoch"]
    card = json.loads(json.dumps(to_json(found, [], [1e21]), allow_nan=False))
    assert card["E"] == pytest.approx(EPOCH.E, rel=1e-3)
    assert set(card["intervals"]) == {"E", "A", "B", "alpha", "beta"}
    with pytest.raises(UserError, match="leaves 0 of 15 points to fit"):
        examine(table, hold_out_above=1.0)


def test_rows_that_repeat_text_fit_the_constants_and_not_the_law():
    table = isoflop()
    unique = table.tokens_P.copy()
    unique[::4] /= 20
    found = examine(
        rows(table.parameters_P, table.tokens_P, table.loss_P + (unique < table.tokens_P), unique_tokens=unique),
        resamples=0,
    )
    assert abs(found.fit.law.E / EPOCH.E - 1) < 1e-3, "the worse losses of repeats do not disturb it"
    assert found.repeated.law.repeats_tokens < 15


GOOD = "run,parameters,tokens,loss\nklein,1e6,2e7,3.5\nmüller,2e6,2e7,3.4\n"


@pytest.mark.parametrize(
    ("change", "encoding"),
    [
        (lambda text: text, "utf-8-sig"),
        (lambda text: text, "utf-16"),
        (lambda text: "\ufeff" + text, "utf-16-be"),
        (lambda text: text.replace("\n", "\r\n"), "utf-8"),
        (lambda text: text.replace("\n", "\r"), "utf-8"),
        (lambda text: text.replace(",", ", "), "utf-8"),
        (lambda text: text.replace(",", " ,\t"), "utf-8"),
        (lambda text: text.replace("parameters", ' "parameters"'), "utf-8"),
        (lambda text: text + ",,,\n,,,\n", "utf-8"),
        (lambda text: text.replace("\n", ",,\n"), "utf-8"),
        (lambda text: text.rstrip("\n"), "utf-8"),
        (lambda text: text + "\n \n\n", "utf-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "RUNS.CSV"])
def test_a_table_is_the_same_however_a_spreadsheet_writes_it(change, encoding, name, tmp_path):
    (tmp_path / name).write_bytes(change(GOOD).encode(encoding))
    found = read([str(tmp_path / name)], {}, None)
    assert found.names == ("klein", "müller")
    assert (found.parameters_P.tolist(), found.loss_P.tolist()) == ([1e6, 2e6], [3.5, 3.4])


def test_rows_have_the_numbers_of_an_editor(table):
    assert table("parameters,tokens,loss\n\n1,2,3\n,,\n\n4,5,6\n").names == ("row 3", "row 6")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (GOOD.encode("latin-1"), "is not UTF-8: byte 0xFC in line 3; save it as UTF-8"),
        (GOOD.encode("utf-16-le"), "has zero bytes.* save it as UTF-8"),
        (GOOD.encode("utf-16")[:-1], "is not UTF-16"),
        (GOOD.replace(".", ",").replace(",", ";").encode(), "separates its columns with ';'; .* write 3.5"),
        (GOOD.replace(",", "\t").encode(), r"separates its columns with '\\t'"),
        (GOOD.replace(".", ",").encode(), "row 2 has 1 more cell than there are columns, 5; write 3.5 rather than 3,5"),
        (b"parameters,tokens,loss,loss\n1,2,3,4\n", r"several columns \['loss'\]"),
        (b"", "no column"),
        (b'parameters,tokens,loss\n1,2,"' + b"3" * 200_000, "is no table: field larger"),
    ],
)
def test_a_table_that_could_be_misread_is_refused(raw, message, tmp_path):
    (tmp_path / "a.csv").write_bytes(raw)
    with pytest.raises(UserError, match=message) as refused:
        read([str(tmp_path / "a.csv")], {}, None)
    assert "\n" not in str(refused.value)
