"""Traces of epochs, and their summary."""

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from realgen_jax.profiling.programs import SCOPES, Operation, operations, scope_of
from realgen_jax.profiling.step_traces import StepTraces, phase
from realgen_jax.profiling.summary import summary, trace_files
from realgen_jax.profiling.trace_reading import Event, device_events, read_trace, self_times
from realgen_jax.training.log import NoLog
from realgen_jax.training.run import check
from realgen_scripts import profile_summary as program
from tests.helpers import golden_config
from tests.helpers.running import ROOT, call


def tables(lines):
    """Read a printed summary: {heading: {row: (ms, %)}}.

    Two programs may each have an operation of the same name; their rows are added up.
    """
    tables = {}
    for line in lines:
        heading = re.match(r"  (\S.*?) +ms +%", line)
        row = re.match(r"  ( *\S.*?) +(-?[\d.]+) +(-?[\d.]+)", line)
        if heading:
            table = tables[heading[1]] = {}
        elif row:
            ms, share = table.get(row[1], (0.0, 0.0))
            table[row[1]] = (ms + float(row[2]), share + float(row[3]))
    return tables


@pytest.mark.slow
def test_the_summary_of_a_run_adds_up_and_agrees_with_its_metrics(cache, tmp_path):
    pytest.importorskip("torch")
    words = ("--config.num_epochs=2", "--config.run_name=traced", "--config.profile.steps=1,2")
    done = call("train.py", cache, f"--config.run_root={tmp_path}", *words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "traced"
    assert f"trace: python scripts/profile_summary.py {run}/profile/step_2" in done.stdout

    # Without the name of an epoch, the last trace is read.
    lines = summary(trace_files(run), 8, 2)
    assert f"{run}/profile/step_2/" in lines[0]
    assert max(map(len, lines[1:])) <= 100
    phases, scopes, operation_table = tables(lines).values()

    # The phases are those of the metrics.
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (row,) = (row for row in rows if row["kind"] == "train" and row["epoch"] == 2)
    for name in ("sample", "reward_wait", "update"):
        assert phases[name][0] == pytest.approx(1e3 * row[f"seconds/{name}"], rel=0.05, abs=5)
    assert phases["checkpoint"][0] > 0

    # Each table adds up to the epoch.
    wall = phases["wall-clock"]
    top = {name: row for name, row in scopes.items() if not name.startswith(" ")}
    for table in (phases, top, operation_table):
        assert table.pop("wall-clock") == wall
        total = sum(share for _, share in table.values())
        assert total == pytest.approx(100, abs=0.06 * len(table))

    # The scopes are those of the programs, and their time lies within the phases.
    assert top.keys() >= {"prefix", "window", "suffix", "decode", "update"}
    assert scopes.keys() >= {"  double", "  single", "  policy", "  reference", "  backward"}
    assert top["no scope"][0] < 0.1 * wall[0]
    sampled = sum(top[name][0] for name in ("prefix", "window", "suffix", "decode"))
    assert 0.3 * phases["sample"][0] < sampled <= phases["sample"][0]
    assert 0.3 * phases["update"][0] < top["update"][0] <= phases["update"][0]

    # The first epoch holds the evaluation before training.
    first = tables(summary(trace_files(run / "profile" / "step_1"), 8, 2))
    assert first["scope on the device"]["  decode"][0] > 0
    assert first["phase of the program"]["evaluate"][0] > 0


def test_an_error_closes_the_trace(tmp_path):

    seconds = {}

    def run(traces):
        for step in (1, 2):
            traces.begin(step)
            with phase("sample", seconds):
                jax.jit(lambda x: x @ x)(jnp.ones((64, 64))).block_until_ready()
        raise ValueError("in the middle")

    with (
        pytest.raises(ValueError, match="in the middle"),
        StepTraces(tmp_path, (2,), NoLog()) as traces,
    ):
        run(traces)
    (file,) = tmp_path.rglob("*.xplane.pb")
    assert file.relative_to(tmp_path).parts[:2] == ("profile", "step_2")
    trace = read_trace(file)
    assert trace.phases["sample"] == pytest.approx(1e9 * seconds["sample"], rel=0.1)
    assert trace.start < min(event.start for events in trace.devices.values() for event in events)
    jax.profiler.start_trace(tmp_path / "next")  # an error if a trace were still open
    jax.profiler.stop_trace()


def test_overlapping_operations_are_counted_once():
    def times(*events, start=0, end=100):
        events = [Event(Operation(name, (), ""), a, b) for name, a, b in events]
        return {operation.name: ns for operation, ns in self_times(events, start, end).items()}

    loop = ("while", 10, 90), ("dot", 20, 40), ("add", 40, 50), ("dot", 50, 80), ("inner", 55, 60)
    assert times(*loop) == {"while": 20, "dot": 45, "add": 10, "inner": 5}
    assert times(*reversed(loop)) == times(*loop)
    assert sum(times(("while", 10, 90), ("dot", 10, 90)).values()) == 80
    assert times(("while", 10, 90), ("dot", 10, 30)) == {"while": 60, "dot": 20}
    two_streams = ("all-reduce", 0, 60), ("dot", 10, 70)
    assert times(*two_streams) == {"all-reduce": 10, "dot": 60}
    assert times(*loop, start=45, end=58) == {"add": 5, "dot": 5, "inner": 3}
    assert times() == {}


def test_an_operation_knows_its_scope():
    forward = "jit(update)/update/while/body/closed_call/jvp(policy)/double/dot"
    assert scope_of(forward) == ("update", "policy", "double")
    backward = (
        "jit(update)/update/transpose(jvp(policy))/checkpoint/rematted_computation/single/"
        "attention/vmap()/dot"
    )
    assert scope_of(backward) == ("update", "backward", "single", "attention")
    merged = (
        "jit(update)/update/while/body/"
        "(transpose(jvp(policy))/double/dot:transpose(jvp(policy))/double/add)"
    )
    assert scope_of(merged) == ("update", "backward", "double")
    for path in ("params['double']['img'].value", "jit(update)/add", ""):
        assert scope_of(path) == ()


def test_scopes_are_read_from_a_compiled_program():
    @jax.jit
    def compute(x):
        with jax.named_scope("window"):
            x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), x[0]), x, length=3)[0]
        with jax.named_scope("decode"):
            return jnp.sort(x)

    (module,) = compute.lower(jnp.ones((8, 8))).compile().runtime_executable().hlo_modules()
    found = operations(module.as_serialized_hlo_module_proto())
    assert {op.scope for op in found if op.does == "dot_general"} == {("window",)}
    assert {op.scope for op in found if op.does == "sort"} == {("decode",)}

    # The compiler's own operations, such as the loop's counter, are in the loop's scope.
    assert ("window",) in [op.scope for op in found if not op.does]


def test_the_summary_knows_every_scope_of_the_source():
    source = "".join(file.read_text() for file in (ROOT / "realgen_jax").rglob("*.py"))
    named = re.findall(r'named_scope\("(\w+)"\)', source)
    of_samplers = re.findall(r'\bscope(?:: str )?= ?"(\w+)"', source)
    assert sorted({*named, *of_samplers, "backward"}) == sorted(SCOPES)


def plane(name, **lines):
    """A plane as ProfileData gives it. `lines`: events (name, start, end, stats) by line name."""

    def make_event(name, start, end, stats):
        return SimpleNamespace(
            name=name, start_ns=start, end_ns=end, duration_ns=end - start, stats=[*stats.items()]
        )

    plane_lines = []
    for line, events in lines.items():
        events = [make_event(*event) for event in events]
        plane_lines.append(SimpleNamespace(name=line, events=events))
    return SimpleNamespace(name=name, lines=plane_lines)


def test_operations_of_a_gpu_are_read_from_its_streams():
    dot = Operation("fusion.1", ("window",), "dot_general")
    stats = {"hlo_op": "fusion.1", "hlo_module": "jit_f", "program_id": 7}
    path = {"hlo_op": "gemm", "hlo_module": "jit_g", "name": "jit(g)/decode/conv"}
    gpu = plane(
        "/device:GPU:0",
        **{
            "Stream #14(Compute)": [
                ("kernel", 0, 5, stats),
                ("kernel", 5, 9, path),
                ("MemcpyD2D", 9, 10, {}),
            ],
            "XLA Modules": [("jit_f", 0, 10, {})],
            "XLA Ops": [("fusion.1", 0, 9, stats)],
        },
    )
    host = plane("/host:CPU", python=[("fusion.1", 0, 1, stats)])  # the kernel's launch
    found = device_events([host, gpu], {7: {"fusion.1": dot}})
    events = [
        (dot, 0, 5),
        (Operation("gemm", ("decode",), "conv"), 5, 9),
        (Operation("MemcpyD2D", (), ""), 9, 10),
    ]
    assert found == {"GPU:0": events}
    assert found != device_events([host], {7: {"fusion.1": dot}}) == {"CPU 0": [(dot, 0, 1)]}


def test_an_operation_of_a_cpu_may_end_in_another_thread():
    stats = {"hlo_op": "dot", "hlo_module": "jit_f", "program_id": 1, "_pt": 0, "_p": 5}
    host = plane(
        "/host:CPU", a=[("dot", 0, 2, stats)], b=[("end: dot", 9, 10, {"_ct": 0, "_c": 5})]
    )
    assert device_events([host], {}) == {"CPU 0": [(Operation("dot", (), ""), 0, 10)]}


def test_a_missing_or_broken_trace_is_an_error_of_one_line(monkeypatch, capsys, tmp_path):
    def error(path):
        monkeypatch.setattr("sys.argv", ["profile_summary.py", str(path)])
        with pytest.raises(SystemExit) as ended:
            program.main()
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    missing = tmp_path / "missing"
    assert error(missing).startswith(f"error: {missing} does not exist; expected a run's folder")

    no_trace = "has no trace, an .xplane.pb file; train.py writes one with --config.profile.steps=3"
    assert error(tmp_path) == f"error: {tmp_path} {no_trace}"
    step = tmp_path / "profile" / "step_3"
    step.mkdir(parents=True)
    assert error(tmp_path) == f"error: {step} {no_trace}"

    file = tmp_path / "x.xplane.pb"
    file.write_text("nothing of the kind")
    assert f"{file} is not a trace (" in error(file)
    file.write_text("")
    assert f"{file} has no operations of a device; expected the trace of an epoch" in error(file)


def test_epochs_that_a_run_does_not_have_are_an_error():
    config = golden_config.get_config()
    config.profile.steps = (1, 4)
    check(config)
    config.profile.steps = (1, 5)
    expected = (
        r"config.profile.steps has 5; expected epochs of this run, 1 to 4 "
        r"\(config.num_epochs\): --conf"
    )
    with pytest.raises(ValueError, match=expected):
        check(config)
