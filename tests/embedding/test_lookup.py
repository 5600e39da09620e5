"""ids -> vectors of every set: right rows, salted hashes, missing values, names that TorchRec cannot carry."""

from dataclasses import replace

import pytest
import torch
from making import make_batch, small_features

from hmoe_rec.embedding.hashing import salt_of, splitmix64
from hmoe_rec.embedding.lookup import MultiEmbedding
from hmoe_rec.embedding.row_ids import RowIds
from hmoe_rec.embedding.tables import table_name
from hmoe_rec.types import EmbeddingSet, Features, IdField, SchemaError, SequenceField

SETS = (EmbeddingSet("wide", 6), EmbeddingSet("narrow", 2), EmbeddingSet("few", 6, ("tags", "history", "hist_item")))


def weight_of(embedding: MultiEmbedding, set_name: str, field: str) -> torch.Tensor:
    name = table_name(set_name, field)
    return next(p for key, p in embedding.named_parameters() if key.endswith(f".{name}.weight"))


def ids_of(batch, key: str) -> list[list[int]]:
    jagged = batch.sparse[key]
    return [row.tolist() for row in jagged.to_dense()]


def python_splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_splitmix64_equals_the_published_function():
    values = [0, 1, -1, 123456789, -(2**63), 2**63 - 1]
    ours = splitmix64(torch.tensor(values, dtype=torch.int64)).tolist()
    assert [x % 2**64 for x in ours] == [python_splitmix64(x % 2**64) for x in values]


def test_every_set_gets_its_own_rows():
    features = small_features(hashed=False)
    embedding, batch = MultiEmbedding(features, SETS), make_batch(small_features(hashed=False))
    vectors = embedding(batch.sparse)
    for s in SETS[:2]:
        pooled = vectors[s.name].pooled.view(5, 3, s.dim)
        for position, field in enumerate(("user", "tags", "city")):
            weight = weight_of(embedding, s.name, field)
            for example, ids in enumerate(ids_of(batch, field)):
                rows = weight[ids]
                expected = rows.mean(0) if field == "tags" and ids else rows.sum(0)
                torch.testing.assert_close(pooled[example, position], expected)
        for example, ids in enumerate(ids_of(batch, "item")):
            torch.testing.assert_close(
                vectors[s.name].targets["item"][example], weight_of(embedding, s.name, "item")[ids].sum(0)
            )
        for example, ids in enumerate(ids_of(batch, "hist_item")):
            behaviors = vectors[s.name].behaviors["history"][example]
            torch.testing.assert_close(behaviors[: len(ids)], weight_of(embedding, s.name, "item")[ids])
            assert (behaviors[len(ids) :] == 0).all()


def test_a_set_with_some_fields_has_only_their_tables():
    embedding = MultiEmbedding(small_features(), SETS)
    names = {key.split(".")[-2] for key, _ in embedding.named_parameters() if "few__" in key}
    assert names == {"few__tags", "few__item"}  # the behaviors' table is the target's
    vectors = embedding(make_batch(small_features()).sparse)["few"]
    assert vectors.targets == {} and list(vectors.behaviors) == ["history"]


def test_target_and_behaviors_share_one_row():
    features = small_features()
    embedding, batch = MultiEmbedding(features, SETS[:1]), make_batch(features)
    out = embedding(batch.sparse)["wide"]
    (out.targets["item"].sum() + out.behaviors["history"].sum()).backward()
    counts = torch.zeros(20)
    for key in ("item", "hist_item"):
        for ids in ids_of(batch, key):
            for i in ids:
                counts[i] += 1
    torch.testing.assert_close(weight_of(embedding, "wide", "item").grad[:, 0], counts)


class TestHashing:
    def rows(self, set_names, ids, salt="set"):
        features = Features(ids=(IdField("city", 50, hashed=True, salt=salt),))
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        sparse = KeyedJaggedTensor(
            keys=["city"], values=torch.tensor(ids), lengths=torch.ones(len(ids), dtype=torch.int32),
            length_per_key=[len(ids)], stride=len(ids),
        )  # fmt: skip
        out = RowIds(features, [(name, "city") for name in set_names])(sparse)
        return out.values().view(len(set_names), -1).tolist()

    def test_equals_the_formula(self):
        ids = [7, -3, 10**17]
        expected = [(python_splitmix64((i ^ salt_of("a", "city")) % 2**64) & (2**63 - 1)) % 50 for i in ids]
        assert self.rows(["a"], ids) == [expected]

    def test_ids_that_collide_in_one_set_are_apart_in_another(self):
        first, second = self.rows(["a", "b"], list(range(3000)))
        pairs = [(i, j) for i in range(60) for j in range(i) if first[i] == first[j]]
        apart = [second[i] != second[j] for i, j in pairs]
        assert len(pairs) > 10 and sum(apart) / len(apart) > 0.9

    def test_one_salt_for_all_sets_where_the_field_asks_for_it(self):
        first, second = self.rows(["a", "b"], list(range(3000)), salt="field")
        assert first == second and first != self.rows(["a"], list(range(3000)))[0]

    def test_the_way_of_a_gpu_gives_the_same_rows(self):
        hashed = tuple(IdField(f"city{i}", 50 + i, hashed=True) for i in range(7))
        features = small_features()
        features = replace(features, ids=(*hashed, *features.ids))
        for batch in (make_batch(features), make_batch(features, 0), make_batch(features, 6000)):
            ids = RowIds(features, [(s, key) for s in ("s", "t") for key in features.sparse_keys])
            sparse = batch.sparse.permute(ids.positions)
            assert torch.equal(ids._run_by_run(sparse), ids._at_once(sparse))
            assert ids(batch.sparse).values().dtype == torch.int32  # half of what the processes exchange

    def test_rows_are_spread_evenly(self):
        counts = torch.bincount(torch.tensor(self.rows(["a"], list(range(10_000)))[0]), minlength=50)
        chi_square = ((counts - 200.0) ** 2 / 200).sum()
        assert counts.numel() == 50 and chi_square < 85  # 99.9 % of uniform draws with 49 degrees of freedom

    def test_the_salt_depends_on_names_only(self):
        assert salt_of("a", "city") == salt_of("a", "city") != salt_of("b", "city")

    def test_only_hashed_fields_are_changed(self):
        features, batch = small_features(), make_batch(small_features())
        out = RowIds(features, [("s", key) for key in features.sparse_keys])(batch.sparse)
        for key in features.sparse_keys:
            before, after = batch.sparse[key].values(), out[table_name("s", key)].values()
            assert (after < 50).all() if key == "city" else torch.equal(before.int(), after)


def test_another_order_of_keys_is_an_error_not_another_model():
    """TorchRec freezes the order of the first batch and would read the wrong tables later without a word."""
    features, batch = small_features(), make_batch(small_features())
    embedding = MultiEmbedding(features, SETS)
    with pytest.raises(ValueError, match="in this order"):
        embedding(batch.sparse.permute([1, 0, 2, 3, 4]))


def test_a_batch_of_one_example():
    features = small_features()
    out = MultiEmbedding(features, SETS)(make_batch(features, 1).sparse)["wide"]
    assert out.pooled.shape == (1, 18) and out.behaviors["history"].shape == (1, 4, 6)


@pytest.mark.parametrize("name", ["a.b", "a/b", "a@b", "", "a b"])
def test_names_that_torchrec_cannot_carry(name):
    with pytest.raises(SchemaError, match="not allowed"):
        MultiEmbedding(small_features(), [EmbeddingSet(name, 6)])


def test_two_tables_of_one_name():
    features = Features(ids=(IdField("b__c", 5), IdField("c", 5)))
    with pytest.raises(SchemaError, match="'a__b__c' would be made twice"):
        MultiEmbedding(features, [EmbeddingSet("a", 6), EmbeddingSet("a__b", 6)])


def test_a_target_must_hold_one_id():
    features = Features(
        ids=(IdField("tags", 9, multi_valued=True),), sequences=(SequenceField("history", (("hist_tags", "tags"),)),)
    )
    with pytest.raises(ValueError, match="'hist_tags': its target 'tags' holds several ids"):
        MultiEmbedding(features, SETS[:1])
