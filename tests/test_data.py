import multiprocessing
from collections import OrderedDict, UserDict
from collections.abc import MutableMapping
from types import MappingProxyType

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from emp_fast import Pruner, collate_with_indices, with_indices
from emp_fast.data import IndexedDataset


class Mappings(Dataset):
    classes = ("a", "b")

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return {"x": torch.tensor(float(index)), "label": index % 2}


class Batched(Mappings):
    def __init__(self):
        self.fetched = []

    def __getitems__(self, indices):
        self.fetched.append(list(indices))
        return [self[i] for i in indices]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_samples_stay_as_they_are():
    inner = TensorDataset(torch.arange(4.0))
    assert with_indices(inner)[2] == (inner[2], 2)
    assert len(with_indices(inner)) == 4
    assert with_indices([10, 11, 12])[1] == (11, 1)


def test_a_negative_index_is_scored_as_the_sample_that_it_means():
    assert with_indices([10, 11, 12])[-1] == (12, 2)


@pytest.mark.parametrize("index", [slice(0, 3), [1, 2]])
def test_one_sample_at_a_time(index):
    with pytest.raises(TypeError, match=r"index must be an int, got .*Subset"):
        with_indices([4, 5, 6])[index]


def test_mapping_samples_get_a_key_and_stay_mappings():
    dataset = with_indices(Mappings())
    assert dataset[3] == {"x": torch.tensor(3.0), "label": 1, "sample_index": 3}
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch["sample_index"].tolist() == [0, 1, 2, 3]
    assert "sample_index" not in Mappings()[3]


def test_mapping_samples_keep_their_type():
    ordered = OrderedDict(y=1, x=2)
    indexed = with_indices([ordered])[0]
    assert type(indexed) is OrderedDict
    assert list(indexed.items()) == [("y", 1), ("x", 2), ("sample_index", 0)]
    assert "sample_index" not in ordered
    features = UserDict(x=2)
    assert type(with_indices([features])[0]) is UserDict
    assert dict(features) == {"x": 2}


def test_a_mapping_that_cannot_be_copied_becomes_a_dict():
    assert with_indices([MappingProxyType({"x": 2})])[0] == {"x": 2, "sample_index": 0}

    class Wrapper(MutableMapping):  # whose copies share its entries
        def __init__(self):
            self.entries = {"x": 2}

        def __getitem__(self, key):
            return self.entries[key]

        def __setitem__(self, key, value):
            self.entries[key] = value

        def __delitem__(self, key):
            del self.entries[key]

        def __iter__(self):
            return iter(self.entries)

        def __len__(self):
            return len(self.entries)

    dataset = with_indices([Wrapper()])
    assert dataset[0] == dataset[0] == {"x": 2, "sample_index": 0}
    assert dict(dataset.dataset[0]) == {"x": 2}


def test_a_mapping_that_has_the_key_already_is_refused():
    with pytest.raises(ValueError, match="'sample_index', got 7"):
        with_indices([{"sample_index": 7}])[0]


def test_getitems_is_delegated_once_a_batch():
    inner = Batched()
    batch = next(iter(DataLoader(with_indices(inner), batch_size=3, sampler=[8, 0, 4])))
    assert inner.fetched == [[8, 0, 4]]
    assert batch["x"].tolist() == [8, 0, 4]
    assert batch["sample_index"].tolist() == [8, 0, 4]


def test_a_batched_fetch_of_the_wrong_length_is_refused():
    class Short(Mappings):
        def __getitems__(self, indices):
            return [self[i] for i in indices[:-1]]

    with pytest.raises(ValueError, match="2 samples, got 1"):
        with_indices(Short()).__getitems__([1, 2])


def test_attributes_are_the_wrapped_datasets():
    assert with_indices(Mappings()).classes == ("a", "b")


def test_wrapping_twice_is_wrapping_once():
    once = with_indices(Mappings())
    assert with_indices(once) is once


@pytest.mark.parametrize("dataset", [Stream(), iter([1, 2]), 7])
def test_what_has_no_index_is_refused(dataset):
    with pytest.raises(TypeError, match=f"map-style.*got {type(dataset).__name__}"):
        with_indices(dataset)


def test_mapping_samples_need_no_such_collate_function():
    loader = DataLoader(
        with_indices([{"x": 1}, {"x": 2}]), collate_fn=collate_with_indices(lambda batch: batch)
    )
    with pytest.raises(TypeError, match="carry their index as 'sample_index'"):
        next(iter(loader))


def test_a_collate_function_must_be_one():
    with pytest.raises(TypeError, match="collate_fn must be a function, got None"):
        collate_with_indices(None)


def add_up(samples):
    return sum(samples)


@pytest.mark.parametrize(
    "method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()]
)
def test_workers_of_either_start_method_see_every_selected_sample_once(method):
    pruner = Pruner(40, prune_rate=0.5)
    loader = DataLoader(
        with_indices(list(range(100, 140))),
        batch_size=6,
        sampler=pruner.sampler,
        num_workers=2,
        multiprocessing_context=method,
        collate_fn=collate_with_indices(add_up),
    )
    seen = []
    for total, indices in loader:
        assert total == int((indices + 100).sum())
        seen += indices.tolist()
    assert sorted(seen) == pruner.selection.indices.tolist()
    assert len(seen) == 20


def test_repr_names_the_wrapped_dataset():
    assert repr(with_indices([1])) == "with_indices([1])"
    assert isinstance(with_indices([1]), IndexedDataset)
