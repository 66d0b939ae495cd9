"""Reading a compiled program: one that is written out here, and one of this machine."""

import jax
import jax.numpy as jnp
import pytest

from realgen_jax.preflight.compiled import collectives
from realgen_jax.preflight.hlo import FREE, read_module, shape_bytes, signatures

TEXT = """HloModule jit_f, is_scheduled=true

%fused (param_0: f32[8], param_1: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  %param_1 = f32[8]{0} parameter(1)
  %twice = f32[8]{0} multiply(%param_0, %param_0), metadata={op_name="jit(f)/policy/mul"}
  ROOT %sum = f32[8]{0} add(%twice, %param_1), metadata={op_name="jit(f)/policy/add"}
}

%fused.1 (param_0.1: f32[8], param_1.1: f32[8]) -> f32[8] {
  %param_1.1 = f32[8]{0} parameter(1)
  %other = f32[8]{0} multiply(%param_1.1, %param_1.1)
  %param_0.1 = f32[8]{0} parameter(0)
  ROOT %sum.1 = f32[8]{0} add(%other, %param_0.1)
}

%fused.2 (param_0.2: f32[8], param_1.2: f32[8]) -> f32[8] {
  %param_0.2 = f32[8]{0} parameter(0)
  %param_1.2 = f32[8]{0} parameter(1)
  %product = f32[8]{0} multiply(%param_0.2, %param_1.2)
  ROOT %sum.2 = f32[8]{0} add(%product, %param_1.2)
}

%fused.3 (param_0.3: f32[8], param_1.3: f32[8]) -> (f32[8], f32[8]) {
  %param_0.3 = f32[8]{0} parameter(0)
  %param_1.3 = f32[8]{0} parameter(1)
  %product.1 = f32[8]{0} multiply(%param_0.3, %param_1.3)
  %sum.3 = f32[8]{0} add(%product.1, %param_1.3), metadata={op_name="jit(f)/policy/add"}
  %square = f32[8]{0} multiply(%param_1.3, %param_1.3)
  %sum.4 = f32[8]{0} add(%square, %param_0.3), metadata={op_name="jit(f)/reference/add"}
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%sum.3, %sum.4)
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8]{0} get-tuple-element(%carry), index=1
  %a = f32[8]{0} fusion(%x, %x), kind=kLoop, calls=%fused
  %b = f32[8]{0} fusion(%x, %a), kind=kLoop, calls=%fused.1
  %c = f32[8]{0} fusion(%x, %b), kind=kLoop, calls=%fused.2
  %d = (f32[8]{0}, f32[8]{0}) fusion(%x, %c), kind=kLoop, calls=%fused.3
  %g = f32[16]{0} all-gather(%c), dimensions={0}, metadata={op_name="jit(f)/policy/single/dot"}
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %c)
}

%condition (carry.1: (s32[], f32[8])) -> pred[] {
  %carry.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (start: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = (s32[], f32[8]{0}) parameter(0)
  ROOT %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def module():
    return read_module(TEXT)


def test_a_loop_runs_its_body_as_often_as_its_trip_count_says(module):
    assert module.entry == "main"
    assert module.runs == {"main": 1, "body": 5, "condition": 5}
    assert [instruction.name for _, instruction in module.kernels()] == ["a", "b", "c", "d", "g"]


def test_a_loop_without_a_trip_count_runs_up_to_its_limit():
    """As the compiler for TPUs writes it."""
    condition = """  %limit = s32[] constant(7)
  %j = s32[] get-tuple-element(%carry.1), index=0
  ROOT %yes = pred[] compare(%j, %limit), direction=LT"""
    text = TEXT.replace("  ROOT %yes = pred[] constant(true)", condition)
    text = text.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    assert read_module(text).runs == {"main": 1, "body": 7, "condition": 7}


def test_a_signature_knows_the_expression_and_not_its_names_or_its_order(module):
    """The second fusion is the first with its operands exchanged; the third is another.

    The fourth has the outputs of the third and of the first.
    """
    body = module.computations["body"]
    ((path, first),) = signatures(module, body["a"])
    ((_, second),) = signatures(module, body["b"])
    ((_, third),) = signatures(module, body["c"])
    assert path == "jit(f)/policy/add"
    assert first == second != third
    assert signatures(module, body["d"]) == [
        ("jit(f)/policy/add", third),
        ("jit(f)/reference/add", first),
    ]


def test_a_fusion_without_a_name_has_its_roots(module):
    assert module.path(module.computations["body"]["a"]) == "jit(f)/policy/add"


def test_collectives_are_counted_by_scope_and_size(module):
    (gather,) = collectives(module)
    assert (gather.scope, gather.kind, gather.runs, gather.bytes) == (
        "policy/single",
        "all-gather",
        5,
        64,
    )


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[3,24]{1,0}", 144),
        ("(bf16[2,2]{1,0}, f32[3]{0}, u8[0]{0})", 20),
        ("f8e4m3fn[10]{0}", 10),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert shape_bytes(shape) == size


def test_this_machines_programs_are_read():
    def f(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, length=7)[0]

    text = jax.jit(f).lower(jnp.ones((8, 8))).compile().as_text()
    module = read_module(text)
    assert 7 in module.runs.values()
    for _, instruction in module.kernels():
        assert instruction.opcode not in FREE
        assert all(len(text) > 10 for _, text in signatures(module, instruction))


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        read_module("nothing")
