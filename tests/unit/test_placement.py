"""What ``resource_placement_groups`` may be, without Ray: groups are stood in for by what has an ``id.hex()``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from roll_vllm.errors import ConfigurationError
from roll_vllm.executor.placement import RankPlacement, parse


@dataclass(frozen=True)
class Identity:
    name: str

    def hex(self) -> str:
        return self.name


@dataclass(frozen=True)
class Group:
    id: Identity


A, B = Group(Identity("aa")), Group(Identity("bb"))


def entry(group: Any = A, gpu: Any = 0, **more: Any) -> dict[str, Any]:
    return {"placement_group": group, "gpu_rank": gpu, "node_rank": 0, "ray_address": "", **more}


@pytest.mark.parametrize("entries", [None, [], ()])
def test_nothing_is_a_group_of_the_executors_own(entries: Any) -> None:
    assert parse(entries, 2) == ((), None)


def test_order_is_the_callers() -> None:
    ranks, address = parse([(B, 3), (A, 1), (A, 0)], 3)
    assert ranks == (RankPlacement("bb", 3), RankPlacement("aa", 1), RankPlacement("aa", 0))
    assert address is None


def test_rolls_entries() -> None:
    entries = [entry(A, 1, ray_address="10.0.0.1:6379", extra=object()), entry(A, 0), entry(B, 0, bundle_index=2)]
    ranks, address = parse(entries, 3)
    assert ranks == (RankPlacement("aa", None, "1"), RankPlacement("aa", None, "0"), RankPlacement("bb", 2, "0"))
    assert address == "10.0.0.1:6379"


def test_a_device_may_be_a_uuid_or_unnamed() -> None:
    ranks, _ = parse([entry(gpu="GPU-1234"), {"placement_group": B}], 2)
    assert [placed.device for placed in ranks] == ["GPU-1234", None]


def test_what_was_read_can_be_read_again() -> None:
    ranks, _ = parse([(A, 0), entry(B)], 2)
    assert parse(ranks, 2)[0] == ranks


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("aa", "is a str, not a list"),
        ({"placement_group": A}, "is a dict, not a list"),
        (A, "not a list"),
        ([(A, 0)], "1 entries for 2 ranks"),
        ([(A, 0), (A, 1), (A, 2)], "3 entries for 2 ranks"),
        ([(A, 0), {"gpu_rank": 1}], r"rank 1: no 'placement_group' among \['gpu_rank'\]"),
        ([(A, 0), (A, -1)], "rank 1: the bundle_index is -1"),
        ([(A, 0), (A, True)], "rank 1: the bundle_index is True"),
        ([(A, 0), (A, "1")], "rank 1: the bundle_index is '1'"),
        ([(A, 0), (A, None)], "rank 1: the bundle_index is None"),
        ([("aa", 0), (A, 1)], "rank 0: the placement group is 'aa', not one of Ray's"),
        ([(A, 0), 7], "rank 1: cannot read 7"),
        ([(A, 0), (A, 1, 2)], "rank 1: cannot read"),
        ([entry(gpu=0.5), entry(gpu=1)], "rank 0: gpu_rank is 0.5"),
        ([entry(gpu=True), entry(gpu=1)], "rank 0: gpu_rank is True"),
        ([entry(gpu=1), entry(gpu=1)], "ranks 0 and 1 .* same placement group and gpu_rank 1"),
        ([entry(ray_address="a:1"), entry(gpu=1, ray_address="b:1")], "several clusters, a:1 and b:1"),
    ],
)
def test_what_is_refused(entries: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse(entries, 2)


def test_the_same_device_number_in_two_groups_is_another_device() -> None:
    assert len(parse([entry(A, 0), entry(B, 0)], 2)[0]) == 2
