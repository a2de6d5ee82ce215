"""What a compiled program sends between chips: on eight CPU devices, where every byte is known, and as a TPU's text has it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.plans import network


def text_of(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


X = P("x")


def on_mesh(function, shape, inside=X, outside=X, axes=("x",), sizes=(8,)):
    """The text of a function of one float32 array, each of eight CPU devices with its shard."""
    mesh = jax.make_mesh(sizes, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, inside))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=False)
    return text_of(mapped, x)


@pytest.mark.parametrize(
    ("kind", "function", "outside", "received"),  # bytes that one of 8 devices takes in, of shards of [16, 128] float32
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "x"), P(), 2 * 8192 * 7 / 8),
        ("all-gather", lambda x: jax.lax.all_gather(x, "x"), P(), 7 * 8192),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "x", tiled=True), P("x"), 8192 * 7 / 8),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), P("x"), 8192 * 7 / 8),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]), P("x"), 8192),
    ],
)
def test_a_collective_is_counted_as_its_ring_moves_it(kind, function, outside, received):
    found = network.moved(on_mesh(function, (128, 128), outside=outside), 8)
    assert list(found.kinds) == [kind]
    assert (found.ici_bytes, found.dcn_bytes) == (received, 0)


def test_a_loops_collectives_count_once_a_turn_and_a_branchs_where_it_is_the_costlier():
    def turns(x):
        def one(x, _):
            return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "x") / 8, lambda x: x, x), None

        return jax.lax.scan(one, x, None, length=11)[0]

    found = network.moved(on_mesh(turns, (128, 128)), 8)
    assert found.kinds["all-reduce"] == (11, 11 * 2 * 8192 * 7 / 8)


def test_groups_of_a_part_of_the_chips_are_read():
    both = on_mesh(
        lambda x: jax.lax.all_gather(x, "y"), (128, 128), P(("x", "y")), P("x"), axes=("x", "y"), sizes=(2, 4)
    )
    assert network.moved(both, 8).ici_bytes == 3 * 8192


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, dim", 4), ("replica_groups=[2,4]<=[8], x", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", 2), ("replica_groups={}, x", 8), ("channel_id=1", 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}, dim", 8), ("replica_groups=mesh['a'=2,'b'=4] {'b'}, d", 4),
        ("replica_groups=mesh['a'=8] {'a':(2)4}, d", 4),
    ],
)  # fmt: skip
def test_replica_groups_are_read_in_every_form(written, size):
    assert network.group(written, 8) == size


def test_groups_that_are_not_understood_are_an_error_and_not_a_guess():
    with pytest.raises(ValueError, match="replica_groups are not understood"):
        network.group("replica_groups=@elsewhere", 8)
    with pytest.raises(ValueError, match="not an HLO module"):
        network.moved("nothing", 8)


# As libtpu 0.0.52 writes them, shortened: a gather spread over fusions; a loop that counts by two and starts at a copy; what
# crosses slices, handed to the host.
TPU = """HloModule jit_step
%start (p: bf16[1,64]) -> (bf16[1,64], bf16[4,64]) {
  %p = bf16[1,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %ag.1 = bf16[4,64]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, backend_config={"async_collective_fusion_config":{}}
  ROOT %cc.1 = (bf16[1,64]{1,0}, /*index=1*/s32[2]{0:S(4)}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.1 (p: bf16[1,64]) -> bf16[4,64] {
  %p = bf16[1,64]{1,0} parameter(0)
  ROOT %ag.2 = bf16[4,64]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, backend_config={"async_collective_fusion_config":{}}
}
%condition (p: (bf16[1,64], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p = (bf16[1,64]{1,0}, u32[]{:T(128)}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}
%body (p: (bf16[1,64], u32[])) -> (bf16[1,64], u32[]) {
  %p = (bf16[1,64]{1,0}, u32[]{:T(128)}) parameter(0)
  %x = bf16[1,64]{1,0} get-tuple-element(%p), index=0
  %cp = (bf16[1,64]{1,0}, bf16[1,64]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %done = bf16[1,64]{1,0} collective-permute-done(%cp)
  %at = u32[]{:T(128)} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%at, %two)
  ROOT %t = (bf16[1,64]{1,0}, u32[]{:T(128)}) tuple(%done, %next)
}
ENTRY %main (a: bf16[1,64]) -> bf16[4,64] {
  %a = bf16[1,64]{1,0} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %begin = u32[]{:T(128)} copy(%zero)
  %init = (bf16[1,64]{1,0}, u32[]{:T(128)}) tuple(%a, %begin)
  %w = (bf16[1,64]{1,0}, u32[]{:T(128)}) while(%init), condition=%condition, body=%body
  %s = (bf16[1,64]{1,0}, /*index=1*/s32[2]{0:S(4)}) fusion(%a), kind=kCustom, calls=%start
  %f = bf16[4,64]{1,0} fusion(%a), kind=kOutput, calls=%async_collective_fusion.1
  %token = token[] after-all()
  %sent = (bf16[4,64]{1,0}, u32[], token[]) send(%f, %token), channel_id=2, frontend_attributes={TO_OTHER_SLICES}
  ROOT %r = bf16[4,64]{1,0} copy(%f)
}
""".replace("TO_OTHER_SLICES", '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"')


def test_a_tpus_program_counts_a_spread_gather_once_and_what_leaves_a_slice_apart():
    found = network.moved(TPU, 4)
    assert found.kinds == {"collective-permute": (4, 4 * 128), "all-gather": (1, 3 * 128), "dcn all-reduce": (1, 512)}
    assert (found.ici_bytes, found.dcn_bytes) == (7 * 128, 512)
