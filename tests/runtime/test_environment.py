"""Environment variables that make no sense are one line that names the variable, its value, and what would be right."""

import os
import subprocess
import sys

import jax
import pytest

from gpt_jax.cli import main
from gpt_jax.config import DistributedConfig
from gpt_jax.errors import UserError
from gpt_jax.runtime import environment
from gpt_jax.runtime.environment import check_variables, cluster_arguments, require_devices

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "h:1"}
JOINED = ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_NTASKS": "2"}
SLURM |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
PREFIXES = ("JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JOB_", "SLURM_", "KUBERNETES_", "TPU_", "MEGASCALE_")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """No variables of a cluster are set, and the machine has no TPU."""
    for name in os.environ:
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "_has_tpu", lambda: False)


@pytest.fixture
def mistake(monkeypatch):
    """A function from variables to the message of the mistake in them."""

    def find(variables, check=lambda: cluster_arguments(DistributedConfig())):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError) as caught:
            check()
        return str(caught.value)

    return find


# -- the processes of a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (JOINED, {"coordinator_address": "h:1", "num_processes": 4, "process_id": 3}),
        (ADDRESS | {"JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "0"}, ("h:1", 4, 0)),
        (JOINED | {"JAX_COORDINATOR_ADDRESS": "[fd00::1]:65535"}, ("[fd00::1]:65535", 4, 3)),
        (JOINED | {"JAX_PROCESS_ID": "", "JOB_COMPLETION_INDEX": "2"}, ("h:1", 4, 2)),
        (JOINED | SLURM, ("h:1", 4, 3)),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, {}),
        (SLURM | {"SLURM_STEP_NODELIST": "a-1,b[1,03-5],c7.example.org,r[1-2]n[3-4]"}, {}),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "abc"}, None),  # a process without a step
        (KUBERNETES, {}),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"JOB_COMPLETION_INDEX": "abc"}, None),  # This is not Kubernetes.
    ],
)
def test_variables_that_make_sense(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    arguments = cluster_arguments(DistributedConfig())
    assert (tuple(arguments.values()) if isinstance(expected, tuple) else arguments) == expected


@pytest.mark.parametrize("value", ["", "h", "h:", ":1", "h:abc", "h:0", "h:65536", "h:-1", "http://h:1", "h:1:2", "h 1:2", "::1"])
def test_an_address_without_host_or_port_is_refused(mistake, value):
    expected = f"'{value}' is not HOST:PORT with a port from 1 to 65535, such as 10.0.0.2:1234"
    assert mistake(JOINED | {"JAX_COORDINATOR_ADDRESS": value}) == f"JAX_COORDINATOR_ADDRESS: {expected}"
    if ":" in value:
        config = DistributedConfig(coordinator=value, num_processes=2, process_id=0)
        assert mistake({}, lambda: cluster_arguments(config)) == f"--distributed.coordinator: {expected}"


NUMBERS = ["abc", "-1", "1.5", "1e3", "٣", "4 ", "0x1", "9" * 20]


@pytest.mark.parametrize("value", ["0", *NUMBERS])
def test_a_number_of_processes_that_makes_no_sense_is_refused(mistake, value):
    expected = f"JAX_NUM_PROCESSES={value}: must be a whole number of at least 1"
    assert mistake(JOINED | {"JAX_NUM_PROCESSES": value}) == expected


@pytest.mark.parametrize("value", ["4", *NUMBERS])
def test_a_process_number_that_makes_no_sense_is_refused(mistake, monkeypatch, value):
    expected = f"={value}: must be a whole number from 0 to 3"
    assert mistake(JOINED | {"JAX_PROCESS_ID": value}) == f"JAX_PROCESS_ID{expected}"
    monkeypatch.delenv("JAX_PROCESS_ID")
    assert mistake({"JOB_COMPLETION_INDEX": value}) == f"JOB_COMPLETION_INDEX{expected}"


@pytest.mark.parametrize("missing", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_a_coordinator_without_numbers_is_refused(mistake, missing):
    variables = {name: value for name, value in JOINED.items() if name != missing}
    message = mistake(variables)
    assert message.startswith(f"{missing} is not set, but the processes of a run need it; set JAX_COORDINATOR_ADDRESS (HOST:PORT")
    assert mistake(variables | {missing: ""}) == message


@pytest.mark.parametrize(
    "variables", [{"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, {"JAX_PROCESS_ID": "3"}, {"JAX_NUM_PROCESSES": "abc"}]
)
def test_numbers_without_a_coordinator_do_not_let_every_process_train_alone(mistake, variables):
    name, value = next(iter(variables.items()))
    assert mistake(variables).startswith(f"{name}={value}: has no effect without JAX_COORDINATOR_ADDRESS; set ")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SLURM_STEP_NUM_TASKS", "abc", "must be a whole number of at least 1"),
        ("SLURM_STEP_NUM_TASKS", "0", "must be a whole number of at least 1"),
        ("SLURM_NTASKS", "-2", "must be a whole number of at least 1"),
        ("SLURM_PROCID", "2", "must be a whole number from 0 to 1"),
        ("SLURM_PROCID", "abc", "must be a whole number from 0 to 1"),
        ("SLURM_LOCALID", "x", "must be a whole number of at least 0"),
        ("SLURM_JOB_ID", "j7", "must be a whole number of at least 0"),
        *(
            (name, value, "must be a list of nodes, such as node1,node2 or node[01-04]")
            for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
            for value in ("", "node[01-02", "node]", "a,,b", "node[a-b]", "a b", "[1-2]", "node[]")
        ),
    ],
)
def test_variables_of_slurm_that_make_no_sense_are_refused(mistake, name, value, expected):
    assert mistake(SLURM | {name: value}) == f"{name}={value}: {expected}"
    if name != "SLURM_STEP_NUM_TASKS":  # JAX also takes details from SLURM if our batch file describes the processes.
        assert mistake(JOINED | SLURM | {name: value}) == f"{name}={value}: {expected}"


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"])
def test_a_step_of_slurm_that_lacks_a_variable_is_refused(mistake, missing):
    message = mistake({name: value for name, value in SLURM.items() if name != missing})
    assert message.startswith(f"{missing} is not set, but SLURM_STEP_NUM_TASKS is; start the processes with srun, or set JAX_COO")


@pytest.mark.parametrize("value", ["abc", "-1", ""])
def test_an_index_of_kubernetes_that_makes_no_sense_is_refused(mistake, value):
    assert mistake(KUBERNETES | {"JOB_COMPLETION_INDEX": value}).startswith("JOB_COMPLETION_INDEX")


TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("TPU_WORKER_ID", "abc", "must be a whole number from 0 to 1"),
        ("TPU_WORKER_ID", "2", "must be a whole number from 0 to 1"),
        ("MEGASCALE_NUM_SLICES", "0", "must be a whole number of at least 1"),
        ("MEGASCALE_SLICE_ID", "2", "must be a whole number from 0 to 1"),
        ("MEGASCALE_SLICE_ID", "x", "must be a whole number from 0 to 1"),
    ],
)
def test_variables_of_a_tpu_that_make_no_sense_are_refused(mistake, monkeypatch, name, value, expected):
    monkeypatch.setattr(environment, "_has_tpu", lambda: True)
    assert mistake(TPU | {name: value}) == f"{name}={value}: {expected}"


def test_variables_of_a_tpu_matter_only_where_there_is_one(monkeypatch):
    for name, value in TPU.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "_has_tpu", lambda: True)
    assert cluster_arguments(DistributedConfig()) == {}
    monkeypatch.setattr(environment, "_has_tpu", lambda: False)
    monkeypatch.setenv("TPU_WORKER_ID", "abc")
    assert cluster_arguments(DistributedConfig()) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0"),
        ("JAX_COORDINATOR_PORT", "abc"),
        ("JAX_COORDINATOR_PORT", "70000"),
        ("JAX_LOCAL_DEVICE_IDS", "0,a"),
        ("JAX_LOCAL_DEVICE_IDS", "-1"),
        ("JAX_PARTITION_INDEX", "one"),
    ],
)
def test_further_variables_that_jax_reads_when_it_joins(mistake, name, value):
    message = mistake(JOINED | {name: value})
    assert message.startswith(name)
    assert value in message


# -- devices and compilers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("--xla_foo=1", "XLA has no such flag: --xla_foo=1; correct or remove it (flags of libtpu belong in LIBTPU_INIT_ARGS)"),
        ("--xla_cpu_enable_fast_math=maybe", "XLA cannot read the value maybe for flag xla_cpu_enable_fast_math"),
        ("foo", 'must consist of flags like --xla_dump_to=FOLDER, or name a file of flags; there is no file "foo"'),
        ("--xla_cpu_enable_fast_math=true --xla_tpu_bar", "XLA has no such flag: --xla_tpu_bar; correct"),
    ],
)
def test_flags_that_would_make_xla_abort_are_refused(mistake, value, expected):
    message = mistake({"XLA_FLAGS": value}, check_variables)
    assert message.startswith(f"XLA_FLAGS={value}: {expected}")
    assert "\n" not in message


@pytest.mark.parametrize("value", ["", " ", "--xla_cpu_enable_fast_math=true", "--xla_dump_to=/tmp/nowhere"])
def test_flags_that_xla_knows_are_accepted(monkeypatch, value):
    monkeypatch.setenv("XLA_FLAGS", value)
    check_variables()


@pytest.mark.parametrize("value", ["0", "0,1", "7, 3", "", "-1", "NoDevFiles", "GPU-8932f937-d72c-4106", "MIG-1-2/3/4"])
def test_gpus_that_can_be_named(monkeypatch, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    check_variables()


@pytest.mark.parametrize("value", ["abc", "0;1", "0,", "cuda:0", "0 1", "0.5", "-2", "all,1", "GPU 0", "0,x"])
def test_gpus_that_cannot_be_named(mistake, value):
    expected = f"CUDA_VISIBLE_DEVICES={value}: must be the numbers of GPUs, such as 0,1, or their UUIDs; -1 for none"
    assert mistake({"CUDA_VISIBLE_DEVICES": value}, check_variables) == expected


def test_a_gpu_is_named_once(mistake):
    assert mistake({"CUDA_VISIBLE_DEVICES": "0,1,0"}, check_variables) == "CUDA_VISIBLE_DEVICES=0,1,0: must not name a GPU twice"


@pytest.mark.parametrize("value", ["0", "abc", "-5", "", "1.5"])
def test_a_number_of_simulated_devices_that_makes_no_sense_is_refused(mistake, value):
    expected = f"JAX_NUM_CPU_DEVICES={value}: must be the number of devices that the CPU simulates, at least 1"
    assert mistake({"JAX_NUM_CPU_DEVICES": value}, check_variables) == expected


def test_gpus_that_are_not_there_are_a_mistake(mistake, monkeypatch):
    gpu = type("Gpu", (), {"platform": "gpu"})()
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    expected = "CUDA_VISIBLE_DEVICES=0,7: names 2 GPUs, but only 1 of them can be used"
    assert mistake({"CUDA_VISIBLE_DEVICES": "0,7"}, require_devices) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    require_devices()
    monkeypatch.setattr(jax, "devices", lambda: [type("Cpu", (), {"platform": "cpu"})()])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    require_devices()  # a cluster's default, on a node without GPUs


@pytest.mark.parametrize(
    "error", [RuntimeError("Unable to initialize backend 'tpu': INTERNAL: no libtpu (set JAX_PLATFORMS='' to"), AssertionError()]
)
def test_a_platform_that_is_not_there_is_a_mistake(mistake, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    message = mistake({"JAX_PLATFORMS": "tpu"}, require_devices)
    reason = "Unable to initialize backend 'tpu': INTERNAL: no libtpu" if str(error) else "its plugin is not installed"
    assert (
        message
        == f"JAX_PLATFORMS=tpu: JAX cannot use this ({reason}); name platforms that this machine has, such as cpu, or unset it"
    )
    monkeypatch.delenv("JAX_PLATFORMS")
    assert (
        mistake({}, require_devices) == f"JAX cannot use the devices of this machine ({reason}); JAX_PLATFORMS=cpu uses the CPU"
    )


@pytest.mark.parametrize(
    ("installed", "tpu", "requested", "expected"),
    [
        ({"libtpu"}, False, None, "cpu"),
        ({"libtpu"}, False, "", "cpu"),
        ({"libtpu"}, True, None, None),
        ({"libtpu", "jax_plugins"}, False, None, None),
        ({"libtpu"}, False, "tpu", "tpu"),
        (set(), False, None, None),
    ],
)
def test_libtpu_is_not_started_on_machines_without_tpus(monkeypatch, installed, tpu, requested, expected):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(environment, "_has_tpu_device", lambda: tpu)
    monkeypatch.setattr(environment, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(jax, "devices", lambda: [type("Cpu", (), {"platform": "cpu"})()])
    monkeypatch.setenv("JAX_PLATFORMS", "")
    if requested is None:
        monkeypatch.delenv("JAX_PLATFORMS")
    else:
        monkeypatch.setenv("JAX_PLATFORMS", requested)
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *change: updates.append(change))
    require_devices()
    assert os.environ.get("JAX_PLATFORMS") == expected
    # The variable has no effect on a JAX that has been imported.
    assert (("jax_platforms", "cpu") in updates) == (expected == "cpu")


# -- the command ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["pretrain smoke --workdir RUN", "evaluate RUN --text F", "generate RUN --prompt a", "checkpoint list RUN", "demo"]
)
def test_every_verb_that_uses_jax_reports_them(monkeypatch, tmp_path, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo")
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith("gpt-jax: XLA_FLAGS=--xla_foo: XLA has no such flag: --xla_foo; correct")
    assert list(tmp_path.iterdir()) == []


def test_other_verbs_do_not_care(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo")
    assert main(["launch", "local", "smoke", "--workdir", str(tmp_path / "run"), "--dry-run"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "JAX_PLATFORMS",
            "nonsense",
            "JAX cannot use this (Unable to initialize backend 'nonsense': Backend 'nonsense' is not in",
        ),
        ("JAX_ENABLE_X64", "maybe", "JAX does not accept this value (invalid truth value 'maybe'"),
        ("JAX_NUM_PROCESSES", "3", "has no effect without JAX_COORDINATOR_ADDRESS"),
        ("SLURM_STEP_NUM_TASKS", "abc", "must be a whole number of at least 1"),
    ],
)
def test_a_process_reports_them_in_one_line_and_writes_nothing(tmp_path, name, value, expected):
    command = [
        sys.executable,
        "-m",
        "gpt_jax",
        "pretrain",
        "smoke",
        "--workdir",
        tmp_path / "run",
        "--data.source",
        "builtin:docs",
    ]
    done = subprocess.run(command, env=os.environ | {name: value}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gpt-jax: {name}={value}: {expected}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
