"""Groups of devices in all notations of HLO are named by the axes of a mesh of 2 x 2 devices, or of 4 x 2."""

import pytest

from gpt_jax.plan.replica_groups import Groups, read_groups

MESH = {"slice": 1, "data": 2, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize(
    ("groups", "axes", "devices"),
    [
        ("replica_groups={{0,1},{2,3}}", "fsdp", 2),
        ("replica_groups={{0,2},{1,3}}", "data", 2),
        ("replica_groups={{0,1,2,3}}, use_global_device_ids=true", "data+fsdp", 4),
        ("replica_groups={}, to_apply=%add", "data+fsdp", 4),
        ("replica_groups=[2,2]<=[4]", "fsdp", 2),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", "data", 2),
        ("replica_groups=[1,4]<=[4]", "data+fsdp", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}", "fsdp", 2),
        ("replica_groups=mesh['slice'=1,'data'=2,'fsdp'=2,'tensor'=1] {'slice','data'}", "data", 2),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}, to_apply=%add", "fsdp", 2),
        ("replica_groups={{0,3},{1,2}}, to_apply=%add", "2 groups of 2", 2),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", "fsdp", 2),
        ("source_target_pairs={{0,0},{1,2},{2,1},{3,3}}", "data+fsdp", 2),
    ],
)
def test_groups_are_named_by_mesh_axes(groups, axes, devices):
    assert read_groups(f", channel_id=1, {groups}", MESH) == Groups(axes, devices)


@pytest.mark.parametrize(
    ("groups", "axes", "devices"),
    [
        ("{'a':(1)4}", "data", 4),  # {0, 2, 4, 6}, {1, 3, 5, 7}
        ("{'a':(4)2}", "fsdp", 2),  # {0, 1}, {2, 3}, ...
        ("{'a':(1)2}", "4 groups of 2", 2),  # {0, 4}, {1, 5}, ...: half of the axis "data"
        ("{'a':(1)2,'a':(2)2}", "data", 4),
        ("{'a'}", "data+fsdp", 8),
    ],
)
def test_a_part_of_an_axis_is_given_by_the_size_before_it_and_its_own(groups, axes, devices):
    assert read_groups(f"replica_groups=mesh['a'=8] {groups}", {"data": 4, "fsdp": 2}) == Groups(axes, devices)


@pytest.mark.parametrize("attributes", ["", ", channel_id=1, replica_groups=all, to_apply=%add"])
def test_an_unknown_notation_is_an_error(attributes):
    with pytest.raises(ValueError, match=r"replica groups in an unknown notation: (channel_id=1, replica_groups=all|$)"):
        read_groups(attributes, MESH)
