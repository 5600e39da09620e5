"""Presets against the tables of the papers, and everything that `validate` finds."""

from dataclasses import replace

import pytest

from hmoe_rec.towers.routing import PRESETS, ExpertSpec, GateInput, Layout, Routing, preset, preset_options, validate
from hmoe_rec.types import ConfigError, EmbeddingSet

TASKS = ["a", "b"]
FIELDS = ["user", "item", "tag"]
MIXED = [{"kind": "gwpfm", "num_parts": 2}, {"kind": "dcnv2"}, {"kind": "flat_dnn"}]


def rows(layout: Layout) -> list[str]:
    """One letter a cell: t, r or ."""
    symbols = {"train": "t", "read": "r", "none": "."}
    return ["".join(symbols[cell] for cell in row) for row in layout.routing.cells]


def reads(layout: Layout) -> list[tuple[str, str]]:
    return [(e.name, e.set) for e in layout.experts]


# name, options, rows, (expert, set) in order, gate inputs: for tasks a and b, columns as the papers order them.
TABLES = [
    ("single", {}, ["t.", ".t"], [("a_1", "a"), ("b_1", "b")], [("a",), ("b",)]),
    ("shared_bottom", {}, ["t", "t"], [("shared_1", "shared")], [("shared",), ("shared",)]),
    (
        "mmoe",
        {"num_experts": 3},
        ["ttt", "ttt"],
        [("shared_1", "shared"), ("shared_2", "shared"), ("shared_3", "shared")],
        [("shared",), ("shared",)],
    ),
    (
        "ple",
        {"task_experts": 1, "shared_experts": 1},
        ["t.t", ".tt"],
        [("a_1", "shared"), ("b_1", "shared"), ("shared_1", "shared")],
        [("shared",), ("shared",)],
    ),
    (
        "multi_embedding",
        {"num_sets": 3},
        ["ttt", "ttt"],
        [("set1_1", "set1"), ("set2_1", "set2"), ("set3_1", "set3")],
        [("set1",), ("set1",)],
    ),
    (
        "stem",
        {},
        ["trt", "rtt"],
        [("a_1", "a"), ("b_1", "b"), ("shared_1", "shared")],
        [("a", "shared"), ("b", "shared")],
    ),
    (
        "ame",
        {"widths": [3, 5, 7]},
        ["ttt", "ttt"],
        [("set1_1", "set1"), ("set2_1", "set2"), ("set3_1", "set3")],
        [("set1",), ("set3",)],
    ),
    ("stem_al", {}, ["tt", ".t"], [("a_1", "a"), ("shared_1", "shared")], [("a", "shared"), ("shared",)]),
    (
        "stem_al",
        {"main_task": "b", "aux_sets": "per_aux"},
        [".t", "tt"],
        [("b_1", "b"), ("a_1", "a")],
        [("a",), ("b",)],
    ),
]


@pytest.mark.parametrize(("name", "options", "cells", "experts", "gates"), TABLES, ids=[row[0] for row in TABLES])
def test_preset_is_the_published_table(name, options, cells, experts, gates):
    layout = preset(name, TASKS, **options)
    assert rows(layout) == cells
    assert reads(layout) == experts
    assert [gate.sets for gate in layout.routing.gate_inputs] == gates
    assert validate(layout, TASKS, FIELDS) == []


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tasks", [["a"], TASKS, ["a", "b", "c", "d", "e"]], ids=len)
def test_every_preset_is_sound_for_any_number_of_tasks(name, tasks):
    layout = preset(name, tasks, expert={"kind": "dcnv2"})
    assert validate(layout, tasks, FIELDS) == []
    assert layout.routing.tasks == tuple(tasks)


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"shared_bottom"}))
@pytest.mark.parametrize("tasks", [["a"], TASKS, ["a", "b", "c", "d", "e"]], ids=len)
def test_every_preset_with_several_experts_takes_several_kinds(name, tasks):
    layout = preset(name, tasks, expert=MIXED)
    assert validate(layout, tasks, FIELDS) == []
    assert {e.kind for e in layout.experts} == {"gwpfm", "dcnv2", "flat_dnn"}


def leak_free(layout: Layout, task: str, set_name: str) -> bool:
    """No way for the task's gradient into the set: no trained expert reads it, and the gate does not look at it."""
    trained = {e.set for e in layout.experts if layout.routing.cell(task, e.name) == "train"}
    return set_name not in trained | set(layout.routing.gate_inputs[layout.routing.tasks.index(task)].sets)


@pytest.mark.parametrize("name", ["single", "stem"])
def test_gradient_of_one_task_cannot_reach_the_set_of_another(name):
    layout = preset(name, ["a", "b", "c"])
    for s in layout.sets:
        for task in ("a", "b", "c"):
            assert leak_free(layout, task, s.name) == (s.owner is not None and s.owner != task)


def test_auxiliary_tasks_of_stem_al_cannot_reach_the_main_set():
    layout = preset("stem_al", ["a", "b", "c"], main_task="b")
    assert leak_free(layout, "a", "b") and leak_free(layout, "c", "b") and not leak_free(layout, "b", "b")


def test_stem_gates_add_up_and_owners_are_named():
    layout = preset("stem", TASKS, embedding_dim=6)
    assert {gate.combine for gate in layout.routing.gate_inputs} == {"sum"}
    assert [(s.name, s.dim, s.owner) for s in layout.sets] == [("a", 6, "a"), ("b", 6, "b"), ("shared", 6, None)]


def test_ple_counts_experts_per_owner():
    layout = preset("ple", TASKS, task_experts=2, shared_experts=3)
    assert rows(layout) == ["tt..ttt", "..ttttt"]
    assert rows(preset("ple", TASKS, shared_experts=0)) == ["t.", ".t"]


def test_ame_spreads_the_gates_over_the_sets_and_can_be_told():
    widths = [4, 8, 16]
    assert [g.sets for g in preset("ame", ["a"], widths=widths).routing.gate_inputs] == [("set1",)]
    five = preset("ame", list("abcde"), widths=widths)
    assert [g.sets[0] for g in five.routing.gate_inputs] == ["set1", "set1", "set2", "set3", "set3"]
    told = preset("ame", TASKS, widths=widths, gate_sets={"b": "set2"})
    assert [g.sets[0] for g in told.routing.gate_inputs] == ["set1", "set2"]
    assert [s.dim for s in preset("ame", TASKS, embedding_dim=5).sets] == [5, 10, 20]


def test_heterogeneous_experts_are_dealt_as_in_the_overview_figure():
    """Two sets, three kinds: the first set has two readers, the second one."""
    layout = preset("multi_embedding", ["a"], expert=MIXED, num_sets=2)
    kinds = [(e.name, e.kind) for e in layout.experts]
    assert kinds == [("set1_1", "gwpfm"), ("set1_2", "flat_dnn"), ("set2_1", "dcnv2")]
    assert layout.experts[0].options == {"num_parts": 2}


def test_every_owner_gets_one_expert_of_each_kind():
    layout = preset("stem", TASKS, expert=MIXED)
    assert [e.kind for e in layout.experts] == ["gwpfm", "dcnv2", "flat_dnn"] * 3
    assert rows(layout) == ["tttrrrttt", "rrrtttttt"]


def test_combine_and_expert_reach_the_layout():
    layout = preset("multi_embedding", TASKS, combine="mean", expert={"kind": "dcnv2", "num_layers": 3})
    assert layout.routing.combine == "mean"
    assert layout.experts[0] == ExpertSpec("set1_1", "dcnv2", "set1", {"num_layers": 3})


def test_table_reads_like_the_picture():
    assert preset("stem", ["click", "like"]).routing.table() == (
        "       click_1  like_1  shared_1\n"
        "click     t       r        t\n"
        "like      r       t        t\n"
        "t = trains the expert   r = reads it, no gradient   . = cut off"
    )


@pytest.mark.parametrize(
    ("name", "tasks", "options", "message"),
    [
        ("stme", TASKS, {}, "preset: unknown preset 'stme'; .*did you mean 'stem'?"),
        ("mmoe", [], {}, "tasks: none given"),
        ("mmoe", TASKS, {"expert": []}, "expert: none given"),
        ("mmoe", TASKS, {"expert": {"knid": "x"}}, "expert: .*expected {kind: ..., option: ...}"),
        ("mmoe", TASKS, {"num_sets": 2}, "num_sets: preset mmoe does not have it; .*known: embedding_dim, num_experts"),
        ("mmoe", TASKS, {"num_experts": 0}, "num_experts: 0 given; expected at least 1"),
        ("multi_embedding", TASKS, {"num_sets": 3, "num_experts": 2}, "num_experts: 2 given for 3 sets"),
        ("ame", TASKS, {"widths": [8, 0]}, r"widths: \[8, 0\] given"),
        ("ame", TASKS, {"gate_sets": {"c": "set1"}}, "gate_sets.c: unknown task 'c'"),
        ("stem_al", TASKS, {"main_task": "c"}, "main_task: unknown task 'c'"),
        ("stem_al", TASKS, {"aux_sets": "own"}, "aux_sets: 'own' given; expected shared or per_aux"),
        ("stem", ["shared", "b"], {}, "tasks: 'shared' is what preset stem calls"),
        ("shared_bottom", TASKS, {"expert": MIXED}, "expert: 3 kinds given; shared_bottom has one expert"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told(name, tasks, options, message):
    with pytest.raises(ConfigError, match=message):
        preset(name, tasks, **options)


def test_all_wrong_arguments_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        preset("ple", TASKS, task_experts=0, num_sets=2, embedding_dim=-1)
    assert len(str(error.value).splitlines()) == 3


def test_preset_options_are_those_of_the_function():
    assert preset_options("ple") == ("embedding_dim", "task_experts", "shared_experts")


SOUND = Layout(
    (EmbeddingSet("s", 4), EmbeddingSet("u", 6, ("user",))),
    (ExpertSpec("e", "x", "s"), ExpertSpec("f", "x", "u")),
    Routing(("a", "b"), ("e", "f"), (("train", "read"), ("none", "train")), (GateInput(("s",)), GateInput(("s", "u")))),
)


def changed(**routing) -> Layout:
    return replace(SOUND, routing=replace(SOUND.routing, **routing))


PROBLEMS = [
    (replace(SOUND, sets=(*SOUND.sets, EmbeddingSet("v", 4))), "sets.v: no expert reads it"),
    (replace(SOUND, sets=(*SOUND.sets, EmbeddingSet("s", 4))), "sets.s: two sets have this name"),
    (replace(SOUND, sets=(SOUND.sets[0], EmbeddingSet("u", 0))), "sets.u.dim: 0 given"),
    (
        replace(SOUND, sets=(SOUND.sets[0], EmbeddingSet("u", 6, ("usr",)))),
        "sets.u.fields: unknown field 'usr'; known: user, item, tag; did you mean 'user'?",
    ),
    (
        replace(SOUND, sets=(SOUND.sets[0], EmbeddingSet("u", 6, ("tag", "tag")))),
        "sets.u.fields: 'tag' is listed twice",
    ),
    (replace(SOUND, sets=(SOUND.sets[0], EmbeddingSet("u", 6, owner="c"))), "sets.u.owner: unknown task 'c'"),
    (
        replace(SOUND, experts=(replace(SOUND.experts[0], set="t"), SOUND.experts[1])),
        "experts.e.set: unknown set 't'; known: s, u",
    ),
    (changed(tasks=("a", "c")), "routes.c: unknown task 'c'"),
    (changed(tasks=("a", "c")), "routes.b: missing; every task needs a row"),
    (changed(cells=(("train", "read"), ("none", "read"))), "routes.b: trains no expert"),
    (changed(cells=(("train", "read"), ("none", "read"))), "routes: no task trains expert 'f'"),
    (changed(cells=(("train", "read"), ("none", "trian"))), "routes.b.f: unknown cell 'trian'"),
    (changed(cells=(("train", "read"),)), "routes: expected one row per task"),
    (changed(combine="avg"), "combine: unknown combine 'avg'"),
    (changed(gate_inputs=(GateInput(("s",)),)), "gate_inputs: 1 given; expected one per task (2)"),
    (changed(gate_inputs=(GateInput(("x",)), GateInput(("s",)))), "gate_inputs.a.sets: unknown set 'x'"),
    (changed(gate_inputs=(GateInput(()), GateInput(("s",)))), "gate_inputs.a.sets: none given"),
    (
        changed(gate_inputs=(GateInput(("s", "u"), "sum"), GateInput(("s",)))),
        "gate_inputs.a: a sum needs sets of one width and the same fields, got s 4, u 6; use combine: concat",
    ),
]


@pytest.mark.parametrize(("layout", "message"), PROBLEMS, ids=[message for _, message in PROBLEMS])
def test_validate_finds(layout, message):
    assert any(message in problem for problem in validate(layout, ["a", "b"], FIELDS)), validate(layout, TASKS, FIELDS)


def test_two_sets_whose_tables_would_have_one_name():
    sets = (EmbeddingSet("s", 4, ("a__b",)), EmbeddingSet("s__a", 4, ("b",)))
    layout = replace(SOUND, sets=sets, experts=(ExpertSpec("e", "x", "s"), ExpertSpec("f", "x", "s__a")))
    problems = validate(layout, TASKS, ["a__b", "b"])
    assert any("its table 's__a__b' has the name of one of set 's'" in problem for problem in problems)


@pytest.mark.parametrize("name", ["a.b", "a@b", "a/b", "a b", ""])
def test_names_that_torchrec_stumbles_over(name):
    layout = replace(SOUND, sets=(EmbeddingSet(name, 4), SOUND.sets[1]))
    assert any("use letters, digits" in problem for problem in validate(layout, TASKS, FIELDS))


def test_validate_accepts_the_sound_one():
    assert validate(SOUND, TASKS, FIELDS) == []
