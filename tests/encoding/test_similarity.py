"""Similarities against naive loops in float64: missing vectors, empty histories, trace, state, and what users read."""

import math

import numpy as np
import pytest
import torch
from making import make_batch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hmoe_rec.batch import Batch
from hmoe_rec.encoding import SIMILARITIES
from hmoe_rec.encoding import frozen as frozen_module
from hmoe_rec.encoding.frozen import FrozenVectors
from hmoe_rec.encoding.similarity import Similarities, cosine, dot
from hmoe_rec.types import Features, FrozenTable, IdField, NumberField, SequenceField, VectorField

B, V = 7, 6
FROZEN = (
    FrozenTable("graph", "item", V),
    FrozenTable("tower", "item", 3),
    FrozenTable("people", "user", V),
)
ALL = {
    "user_item": {"kind": "cosine", "of": ["people", "graph"]},
    "given_item": {"kind": "dot", "of": ["text", "tower"], "low": -2, "high": 3.5},
    "two_given": {"kind": "cosine", "of": ["text", "image"]},
    "raw": {"kind": "vector", "of": "tower"},
    "near": {"kind": "history", "vectors": "graph", "sequence": "watched"},
    "like": {"kind": "history", "vectors": "tower", "sequence": "liked", "measure": "dot", "low": -1.0, "high": 1.0},
    "tiers": {"kind": "tiers", "vectors": "graph", "sequence": "watched", "num_tiers": 4},
    "like_tiers": {"kind": "tiers", "vectors": "tower", "sequence": "liked"},
}
NUMBERS = ("user_item", "given_item", "two_given", "near", "like")


def features(*, missing_row: bool = True) -> Features:
    return Features(
        ids=(
            IdField("user", 30),
            IdField("item", 8, missing_row=missing_row),
            IdField("author", 5),
            IdField("tags", 10, pooling="mean", multi_valued=True),
            IdField("city", 50, hashed=True),
        ),
        sequences=(
            SequenceField("watched", (("watched_author", "author"), ("watched_item", "item")), False, 4),
            SequenceField("liked", (("liked_item", "item"),), False, 4),
        ),
        numbers=(NumberField("price"), NumberField("age")),
        vectors=(VectorField("pixels", 2), VectorField("text", 3), VectorField("image", 3)),
    )


def filled(similarities: dict | None = None) -> Similarities:
    """Some ids of every table have no vector; one vector of each table is there as its negative too."""
    made = Similarities(features(), ALL if similarities is None else similarities, FROZEN, SIMILARITIES)
    for name, rows in {"graph": 8, "tower": 8, "people": 30}.items():
        ids = torch.tensor([i for i in range(rows) if i % 4 != 2])
        vectors = torch.randn(len(ids), made.tables[name].dim)
        vectors[1] = -vectors[0]
        made.tables[name].fill(ids, vectors)
    return made


def batch(size: int = B, seed: int = 3) -> Batch:
    made = make_batch(features(), size, seed=seed)
    made.vectors[1:2, 2:5] = 0.0  # an example without text
    return made


def expected(made: Similarities, given: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Example by example, as the docstrings say it."""
    ids = {key: given.sparse[key].to_dense() for key in given.sparse.keys()}
    text, image = given.vectors[:, 2:5].double(), given.vectors[:, 5:8].double()

    def row(table, key, i):
        vectors = made.tables[table].vectors.double()
        return vectors[ids[key][i][0]] if len(ids[key][i]) else torch.zeros(vectors.shape[1], dtype=torch.float64)

    def rows(table, key, i):
        found = [made.tables[table].vectors.double()[j] for j in ids[key][i]]
        return [r for r in found if r.abs().sum() > 0]

    def product(a, b):
        return float(a @ b) if a.abs().sum() > 0 and b.abs().sum() > 0 else math.nan

    def cos(a, b):
        return product(a, b) / (float(a.norm()) * float(b.norm()) or math.nan)

    def mean(found):
        return torch.stack(found).mean(0)

    def tiers(found, target, n):
        counts = [0] * n
        for c in [cos(r, target) for r in found if target.abs().sum() > 0]:
            counts[min(n - 1, max(0, math.floor((c + 1) / (2 / n))))] += 1
        return [math.log1p(c) for c in counts]

    numbers, vectors = [], []
    for i in range(len(given)):
        graph, tower = row("graph", "item", i), row("tower", "item", i)
        watched, liked = rows("graph", "watched_item", i), rows("tower", "liked_item", i)
        numbers.append(
            [
                cos(row("people", "user", i), graph),
                product(text[i], tower),
                cos(text[i], image[i]),
                cos(mean(watched), graph) if watched else math.nan,
                float(mean(liked) @ tower) if liked and tower.abs().sum() > 0 else math.nan,
            ]
        )
        vectors.append(tower.tolist() + tiers(watched, graph, 4) + tiers(liked, tower, 10))
    return torch.tensor(numbers), torch.tensor(vectors)


class Inside(nn.Module):
    """A model that uses similarities, as far as tracing is concerned."""

    def __init__(self, similarities: Similarities) -> None:
        super().__init__()
        self.similarities = similarities

    def forward(self, batch: Batch) -> torch.Tensor:
        numbers, vectors = self.similarities(batch)
        return torch.cat([numbers.nan_to_num(-9.0), vectors], dim=1)


def alone(kind: str, **options) -> Similarities:
    return filled({"it": {"kind": kind, **options}})


class TestAgainstLoops:
    @pytest.mark.parametrize("seed", range(4))
    def test_equal(self, seed):
        made, given = filled(), batch(40, seed)
        numbers, vectors = made(given)
        expected_numbers, expected_vectors = expected(made, given)
        torch.testing.assert_close(numbers, expected_numbers, atol=1e-5, rtol=1e-5, equal_nan=True)
        torch.testing.assert_close(vectors, expected_vectors, atol=1e-5, rtol=1e-5)
        assert numbers.isnan().any(0).all() and (~numbers.isnan()).any(0).all()  # both are seen in every column

    def test_what_it_says_it_gives_is_what_it_gives(self):
        made = filled()
        numbers, vectors = made(batch())
        assert tuple(n.name for n in made.numbers) == NUMBERS and numbers.shape == (B, 5)
        assert [(v.name, v.dim) for v in made.vectors] == [("raw", 3), ("tiers", 4), ("like_tiers", 10)]
        assert vectors.shape == (B, 17) and numbers.dtype == vectors.dtype == torch.float32
        bounds = {n.name: n.bounds for n in made.numbers}
        assert bounds["given_item"] == (-2.0, 3.5) and bounds["near"] == bounds["user_item"] == (-1.0, 1.0)
        assert all((n.transform, n.mean, n.std) == ("none", 0.0, 1.0) for n in made.numbers)

    def test_behaviors_are_taken_piece_by_piece(self, monkeypatch):
        made, given = filled(), batch(40)
        _, whole = made(given)
        monkeypatch.setattr(frozen_module, "_ELEMENTS_AT_ONCE", {"cpu": 13})
        torch.testing.assert_close(made(given)[1], whole, rtol=0, atol=0)

    def test_int32_ids(self):
        made, given = filled(), batch(40)
        small = given.sparse.values() % 5  # also the hashed ids
        numbers, vectors = made(with_ids(given, small))
        numbers32, vectors32 = made(with_ids(given, small.int()))
        torch.testing.assert_close(numbers32, numbers, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(vectors32, vectors, rtol=0, atol=0)

    def test_examples_are_independent(self):
        made, given = filled(), batch(9)
        numbers, vectors = made(given)
        for i in range(9):
            one_number, one_vector = made(example(given, i))
            torch.testing.assert_close(one_number[0], numbers[i], equal_nan=True)
            torch.testing.assert_close(one_vector[0], vectors[i])

    def test_a_table_is_read_once_per_key(self, monkeypatch):
        read = []
        forward = FrozenVectors.forward
        monkeypatch.setattr(FrozenVectors, "forward", lambda self, ids: read.append(self) or forward(self, ids))
        made = filled()
        made(batch())
        assert len(read) == 3 and {id(table) for table in read} == {id(table) for table in made.tables.values()}


def with_ids(given: Batch, values: torch.Tensor) -> Batch:
    sparse = given.sparse
    made = KeyedJaggedTensor(keys=sparse.keys(), values=values, lengths=sparse.lengths(), stride=sparse.stride())
    return Batch.of(made, given.labels, numbers=given.numbers, vectors=given.vectors)


def example(given: Batch, i: int) -> Batch:
    """The batch of one example."""
    sparse = given.sparse
    parts = {key: sparse[key].to_dense()[i] for key in sparse.keys()}
    made = KeyedJaggedTensor(
        keys=list(parts),
        values=torch.cat(list(parts.values())),
        lengths=torch.tensor([len(p) for p in parts.values()], dtype=torch.int32),
    )
    return Batch.of(made, given.labels[i : i + 1], numbers=given.numbers[i : i + 1], vectors=given.vectors[i : i + 1])


def ids_of(**given: list[list[int]]) -> Batch:
    """A batch of these ids; all others are missing."""
    size = len(next(iter(given.values())))
    lists = [given.get(key, [[]] * size) for key in features().sparse_keys]
    sparse = KeyedJaggedTensor(
        keys=list(features().sparse_keys),
        values=torch.tensor([x for rows in lists for row in rows for x in row], dtype=torch.int64),
        lengths=torch.tensor([len(row) for rows in lists for row in rows], dtype=torch.int32),
    )
    return Batch.of(sparse, torch.zeros(size, 1), vectors=torch.randn(size, 8))


class TestProperties:
    @pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
    def test_cosine_of_a_vector_with_itself_is_one(self, scale):
        x = torch.randn(1000, V) * scale
        torch.testing.assert_close(cosine(x, x), torch.ones(1000), atol=1e-6, rtol=0)
        torch.testing.assert_close(cosine(x, -3.0 * x), -torch.ones(1000), atol=1e-6, rtol=0)
        assert cosine(x, x).max() <= 1.0 and cosine(x, -x).min() >= -1.0

    def test_itself_gets_the_last_code_and_its_opposite_the_first(self):
        """R = 1024 codes: round((w + 1) / 2 * 1023)."""
        x = torch.randn(1000, V)
        assert (((cosine(x, x) + 1) / 2 * 1023).round() == 1023).all()
        assert (((cosine(x, -x) + 1) / 2 * 1023).round() == 0).all()

    def test_a_zero_vector_is_missing_on_either_side(self):
        x, zero = torch.randn(2, V), torch.zeros(2, V)
        for measure in (cosine, dot):
            assert measure(x, zero).isnan().all() and measure(zero, x).isnan().all()
            assert measure(zero, zero).isnan().all()
        assert dot(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == 0.0

    def test_missing_ids(self):
        """No id, the id of the missing row, and an id without a vector (2) say the same."""
        made = filled()
        given = ids_of(user=[[0]] * 4, item=[[], [8], [2], [0]], watched_item=[[0, 1]] * 4)
        numbers, vectors = made(given)
        columns = [i for i, name in enumerate(NUMBERS) if name in ("user_item", "given_item", "near")]
        assert numbers[:3, columns].isnan().all() and (vectors[:3] == 0).all()
        assert not numbers[3, 0].isnan() and vectors[3, :3].abs().sum() > 0

    def test_an_empty_history_and_one_without_vectors_are_missing(self):
        made = filled()
        given = ids_of(item=[[0]] * 3, watched_item=[[], [2, 6, 8], [3]], liked_item=[[], [2, 6, 8], [3]])
        numbers, vectors = made(given)
        assert numbers[:2, 3:].isnan().all() and not numbers[2, 3:].isnan().any()
        assert (vectors[:2, 3:] == 0).all()

    def test_tiers_sum_to_the_number_of_behaviors(self):
        made, given = alone("tiers", vectors="graph", sequence="watched"), batch(40)
        counts = made(given)[1].expm1()
        ids = given.sparse["watched_item"].to_dense()
        known = [sum(int(j) % 4 != 2 and int(j) != 8 for j in row) for row in ids]
        target = [len(i) > 0 and int(i) % 4 != 2 and int(i) != 8 for i in given.sparse["item"].to_dense()]
        wanted = torch.tensor([float(n if there else 0) for n, there in zip(known, target, strict=True)])
        torch.testing.assert_close(counts.sum(1), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(counts, counts.round(), atol=1e-5, rtol=0)

    def test_the_target_itself_is_in_the_last_tier_and_its_opposite_in_the_first(self):
        made = alone("tiers", vectors="graph", sequence="watched", num_tiers=5)
        vectors = made(ids_of(item=[[0]], watched_item=[[0, 1, 0, 0]]))[1]
        torch.testing.assert_close(vectors, torch.tensor([[1.0, 0, 0, 0, 3.0]]).log1p())

    def test_a_mean_that_is_zero_has_a_product_but_no_cosine(self):
        given = ids_of(item=[[3]], watched_item=[[0, 1]])
        options = {"vectors": "graph", "sequence": "watched"}
        assert alone("history", **options)(given)[0].isnan().all()
        assert alone("history", **options, measure="dot", low=-1, high=1)(given)[0].item() == 0.0

    def test_no_gradient_even_if_the_vectors_have_one(self):
        given = batch()
        given.vectors.requires_grad_()
        numbers, vectors = filled()(given)
        assert not numbers.requires_grad and not vectors.requires_grad
        assert not list(filled().parameters())


class TestContract:
    def test_every_kind_is_in_these_tests(self):
        assert {options["kind"] for options in ALL.values()} == set(SIMILARITIES)

    def test_empty_batch(self):
        made = filled()
        numbers, vectors = made(batch(0))
        assert numbers.shape == (0, 5) and vectors.shape == (0, 17)
        numbers, vectors = made(batch(0).filled())
        assert numbers.shape == (1, 5) and (vectors == 0).all()
        assert numbers[:, [0, 1, 3, 4]].isnan().all() and numbers[:, 2].isnan().all()

    def test_traced_equals_eager(self):
        model = Inside(filled())
        traced = torch.fx.symbolic_trace(model)
        for size, seed in [(B, 3), (11, 4), (0, 5)]:
            torch.testing.assert_close(traced(batch(size, seed)), model(batch(size, seed)), rtol=0, atol=0)

    def test_float32_under_autocast(self):
        made, given = filled(), batch()
        numbers, vectors = made(given)
        with torch.autocast("cpu", torch.bfloat16):
            numbers16, vectors16 = made(given)
        assert numbers16.dtype == vectors16.dtype == torch.float32
        torch.testing.assert_close(numbers16, numbers, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(vectors16, vectors, rtol=0, atol=0)

    def test_state_round_trip(self):
        made, given = filled(), batch()
        state = made.state_dict()
        assert {f"tables.{t.name}.vectors" for t in FROZEN} < state.keys()
        empty = Similarities(features(), ALL, FROZEN, SIMILARITIES)
        before = empty(given)
        assert before[0][:, [0, 1, 3, 4]].isnan().all() and (before[1] == 0).all()
        empty.load_state_dict(state)
        for ours, theirs in zip(empty(given), made(given), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)

    def test_on_the_meta_device_first(self):
        with torch.device("meta"):
            made = Similarities(features(), ALL, FROZEN, SIMILARITIES)
        with pytest.raises(ValueError, match="meta device"):
            made.tables["graph"].fill([0], np.ones((1, V)))
        made.to_empty(device="cpu").load_state_dict(filled().state_dict())
        assert made(batch())[0].shape == (B, 5)

    def test_none_at_all(self):
        numbers, vectors = Similarities(features(), {}, (), SIMILARITIES)(batch())
        assert numbers.shape == (B, 0) and vectors.shape == (B, 0)

    @pytest.mark.gpu
    def test_gpu_equals_cpu_and_itself(self):
        made, given = filled(), batch(40)
        expected_numbers, expected_vectors = made(given)
        made, given = made.to("cuda"), given.to(torch.device("cuda"))
        numbers, vectors = made(given)
        torch.testing.assert_close(numbers.cpu(), expected_numbers, equal_nan=True)
        torch.testing.assert_close(vectors.cpu(), expected_vectors)
        for ours, again in zip((numbers, vectors), made(given), strict=True):
            torch.testing.assert_close(ours, again, rtol=0, atol=0, equal_nan=True)


class TestFrozenVectors:
    def test_fill_overwrites_only_what_is_given(self):
        table = FrozenVectors(5, 3)
        table.fill(np.array([4, 1], np.int16), np.arange(6.0).reshape(2, 3))
        table.fill(torch.tensor([1]), torch.ones(1, 3))
        wanted = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 1, 2]])
        torch.testing.assert_close(table(torch.arange(5)), wanted)
        torch.testing.assert_close(table.norms, wanted.norm(dim=1))
        table.fill(np.empty(0, np.int64), np.empty((0, 3)))
        torch.testing.assert_close(table.vectors, wanted)

    @pytest.mark.parametrize(
        "ids, vectors, message",
        [
            ([0, 5], np.ones((2, 3)), r"\[0, 5\), 1 of 2 are not, such as 5"),
            ([-1, 0], np.ones((2, 3)), "such as -1"),
            ([2, 1, 2], np.ones((3, 3)), "once, 1 come more often, such as 2"),
            ([2, 1], np.ones((2, 4)), r"\[2, 3\], got \[2, 4\]"),
            ([2, 1], np.ones((1, 3)), r"\[2, 3\], got \[1, 3\]"),
            ([0.5], np.ones((1, 3)), "integers"),
            ([[0]], np.ones((1, 3)), "integers"),
            ([3, 2], [[1.0, 2, 3], [1, math.nan, 3]], "finite.*1 are not, such as that of id 2"),
            ([3], [[1e30, 2, 3]], "lengths in float32"),
        ],
    )
    def test_errors(self, ids, vectors, message):
        table = FrozenVectors(5, 3)
        with pytest.raises(ValueError, match=message):
            table.fill(ids, vectors)
        assert (table.vectors == 0).all()

    def test_sizes(self):
        with pytest.raises(ValueError, match="num_rows >= 1"):
            FrozenVectors(0, 3)


HISTORY = {"kind": "history", "vectors": "graph", "sequence": "watched"}


class TestErrors:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"kind": "cosin", "of": ["graph", "people"]}, "unknown kind 'cosin'; did you mean 'cosine'"),
            ({"of": ["graph", "people"]}, "kind: missing; expected one of cosine"),
            ({"kind": "cosine", "of": ["grap", "people"]}, "unknown vector column or frozen table 'grap'.*'graph'"),
            ({"kind": "cosine", "of": ["graph"]}, "expected the names of two vectors"),
            ({"kind": "cosine", "of": "graph"}, "expected the names of two vectors"),
            ({"kind": "cosine", "of": ["graph", "graph"]}, "expected the names of two vectors"),
            ({"kind": "cosine", "of": ["graph", "tower"]}, "'graph' has width 6 and 'tower' has 3"),
            ({"kind": "dot", "of": ["graph", "people"], "low": 1, "high": 1}, "low < high, got low: 1, high: 1"),
            ({"kind": "dot", "of": ["graph", "people"], "low": 1, "high": math.inf}, "low < high"),
            ({"kind": "vector", "of": "text"}, "unknown frozen table 'text'; known: graph, tower, people"),
            ({**HISTORY, "vectors": "towr"}, "vectors: unknown frozen table 'towr'.*'tower'"),
            ({**HISTORY, "sequence": "watch"}, "sequence: unknown sequence 'watch'.*'watched'"),
            ({**HISTORY, "vectors": "people"}, "'watched' has 0 columns of ids of 'user'"),
            ({**HISTORY, "measure": "l2"}, "measure must be 'cosine' or 'dot', got 'l2'"),
            ({**HISTORY, "measure": "dot", "low": 0.0}, "low < high, got low: 0.0, high: None"),
            ({**HISTORY, "low": 0.0}, "low and high are for measure: dot"),
            ({**HISTORY, "kind": "tiers", "num_tiers": 0}, "num_tiers must be >= 1"),
        ],
    )
    def test_of_a_similarity(self, options, message):
        with pytest.raises(ValueError, match=f"similarity 'it': .*{message}"):
            Similarities(features(), {"it": options}, FROZEN, SIMILARITIES)

    def test_a_name_that_is_taken(self):
        with pytest.raises(ValueError, match="similarity 'price': there is a field of this name"):
            Similarities(features(), {"price": ALL["raw"]}, FROZEN, SIMILARITIES)

    @pytest.mark.parametrize(
        "table, message",
        [
            (FrozenTable("x", "itm", V), "unknown id field 'itm'.*'item'"),
            (FrozenTable("x", "city", V), "ids of field 'city' are hashed.*use mode: vocabulary"),
            (FrozenTable("x", "tags", V), "field 'tags' holds several ids"),
            (FrozenTable("text", "item", V), "there is a vector column of this name"),
            (FrozenTable("items", "item", V), "cannot be the name of a module"),
            (FrozenTable("a.b", "item", V), "cannot be the name of a module"),
            (FrozenTable("training", "item", V), "cannot be the name of a module"),
            (FROZEN[0], "there are two of this name"),
        ],
    )
    def test_of_a_table(self, table, message):
        with pytest.raises(ValueError, match=f"frozen table '{table.name}': .*{message}"):
            Similarities(features(), {}, (*FROZEN, table), SIMILARITIES)

    def test_two_columns_of_one_field(self):
        given = features()
        twice = SequenceField("both", (("a", "item"), ("b", "item")))
        given = Features(given.ids, (twice,), given.numbers, given.vectors)
        with pytest.raises(ValueError, match="'both' has 2 columns of ids of 'item'.*expected one"):
            Similarities(given, {"it": {**HISTORY, "sequence": "both"}}, FROZEN, SIMILARITIES)
