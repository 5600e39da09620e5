import shlex

import pytest

from launch.command import Layout, allowed, parse_layout, split_overrides, torchrun_role


def test_packages_that_are_allowed_go_to_the_program():
    assert allowed("") == [] and allowed("a, b.c") == ["--allow", "a", "--allow", "b.c"]


@pytest.mark.parametrize(
    ("j", "num_gpus", "expected"),
    [
        ("1x2", 0, Layout(1, 1, 2)),
        ("2x8", 8, Layout(2, 2, 8)),
        ("2:4x8", 8, Layout(2, 4, 8)),
        ("3", 8, Layout(3, 3, 8)),
        ("3", 0, Layout(3, 3, 1)),
    ],
)
def test_layouts(j, num_gpus, expected):
    assert parse_layout(j, num_gpus) == expected


@pytest.mark.parametrize(
    ("j", "num_gpus", "said"),
    [
        ("2*8", 0, "expected [MIN_NODES:]NODES[xPROCESSES]"),
        ("0x2", 0, "1 <= MIN_NODES <= NODES"),
        ("1x0", 0, "at least one process"),
        ("3:2x1", 0, "1 <= MIN_NODES <= NODES"),
        ("1x9", 8, "9 processes on a host with 8 GPUs"),
    ],
)
def test_impossible_layouts_say_why(j, num_gpus, said):
    with pytest.raises(ValueError) as error:
        parse_layout(j, num_gpus)
    assert f"-j {j}" in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a.b=1", ["a.b=1"]),
        ("a=1, b=2,", ["a=1", "b=2"]),
        ("a=[1,2],b={x: [3,4], y: 5}", ["a=[1,2]", "b={x: [3,4], y: 5}"]),
        ("a='x,y',b=2", ["a='x,y'", "b=2"]),
        ("data.train=s3://b/x=1/p", ["data.train=s3://b/x=1/p"]),
        ("train.task_weights.a-b=2, x.*__user=fp16", ["train.task_weights.a-b=2", "x.*__user=fp16"]),
    ],
)
def test_overrides_are_cut_at_outer_commas(text, expected):
    assert split_overrides(text) == expected


@pytest.mark.parametrize(
    ("text", "said"), [("a=1,b", "'b' is not key=value"), ("a=[1,2", "not closed"), ("a='1", "not closed")]
)
def test_bad_overrides_say_why(text, said):
    with pytest.raises(ValueError, match=said):
        split_overrides(text)


def role(program, j="1x2", h="cpu2", **changes):
    options = {"image": "i", "max_restarts": 3, "max_retries": 0, "mounts": [], "env": {}, "rdzv_port": 29500}
    return torchrun_role("trainer", program, j=j, h=h, **(options | changes))


def test_the_program_reaches_the_shell_unharmed():
    program = ["hmoe_rec", "train", "a b.yaml", "x='1 $HOME `id`'", "y=[1,2]"]
    command = role(program).args[1].replace("$$", "$")  # what torchx's templates leave
    assert shlex.split(command)[-len(program) :] == program


def test_one_node_meets_itself_on_a_free_port_and_several_at_the_first():
    assert "--rdzv-endpoint localhost:0 " in role(["m"]).args[1]
    several = role(["m"], j="1:3x2", rdzv_port=1234)
    assert "--nnodes 1:3 " in several.args[1]
    assert "--rdzv-endpoint $${${rank0_env}:=localhost}:1234 " in several.args[1]
    assert (several.min_replicas, several.num_replicas, several.port_map) == (1, 3, {"c10d": 1234})


def test_given_environment_is_stronger():
    assert role(["m"], env={"OMP_WAIT_POLICY": "ACTIVE", "A": "1"}).env == {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_WAIT_POLICY": "ACTIVE",
        "PYTHONUNBUFFERED": "1",
        "A": "1",
    }
