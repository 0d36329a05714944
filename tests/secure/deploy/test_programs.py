import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from clusters import ROOT, W, X, affine, check_served, publish

from flaxmpc import secure
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.local import write_local
from flaxmpc.secure.deploy.programs import Approved, compile_program, jointly

PLANNED = secure.Planned(jax.ShapeDtypeStruct(W.shape, W.dtype))

ELSEWHERE = """
import sys, jax
sys.path.insert(0, "tests")
from clusters import W, X, affine
from flaxmpc import secure
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.programs import compile_program
planned = secure.Planned(jax.ShapeDtypeStruct(W.shape, W.dtype))
print(compile_program(ClusterFile.read(sys.argv[1]), affine, planned, X, length=4).digest)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Whose parties take approved programs only."""
    written = write_local(tmp_path_factory.mktemp("cluster") / "c")
    return msgspec.structs.replace(written, programs="programs.txt")


@pytest.fixture(scope="module")
def program(cluster):
    return compile_program(cluster, affine, PLANNED, X, length=4)


def test_a_program_is_for_one_request_and_for_as_many_as_the_limits_allow(program):
    assert (program.batch, program.length, list(program.joint)) == (2, 4, [2, 4])
    array = m.Array((2, 4), "float32")
    assert (program.inputs, program.outputs) == ((array,), (array,))


def test_what_is_put_is_what_is_compiled_without_the_weights(owner, program):
    assert owner.program(affine, owner.put(W), X, length=4) == program


@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_program_is_the_same_in_another_process(cluster, program, tmp_path, seed):
    """Its own cache, another order of sets, another place in another file."""
    environment = os.environ | {"FLAXMPC_CACHE": str(tmp_path), "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", "\n" * int(seed) + ELSEWHERE, str(cluster.path)]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == program.digest


@pytest.mark.parametrize(
    "change",
    [
        {"code": b"other"},
        {"joint": {2: b"other"}},
        {"joint": {}},
        {"inputs": (m.Array((4, 4), "float32"),)},
        {"outputs": ()},
    ],
)
def test_whatever_differs_is_another_program(program, change):
    assert msgspec.structs.replace(program, **change).digest != program.digest


def test_approved_programs_are_lines_of_a_file(cluster, program):
    path = cluster.file("programs.txt")
    approved = Approved.of(cluster)
    assert approved is not None
    with pytest.raises(ValueError, match=r"programs\.txt can't be read: .*No such file.*: it lists approved"):
        approved.digests()
    other = msgspec.structs.replace(program, code=b"other")
    approved.add("film", {"2x4": program})
    approved.add("film", {"2x4": program, "4x4": other})
    assert path.read_text() == f"{program.digest}  film 2x4\n{other.digest}  film 4x4\n"
    path.write_text(f"# of the film model\n\n{program.digest}\n")
    approved.add(f"film\n{'a' * 64}\u2028{'b' * 64}\r{'c' * 64}", {"4x4": other})
    assert approved.digests() == {program.digest, other.digest}
    assert Approved.of(msgspec.structs.replace(cluster, programs=None)) is None


@pytest.mark.parametrize("line", ["film", "A" * 64, "a" * 63, "a" * 65, f" {'a' * 64}", "\x00", "ä" * 64])
def test_what_is_no_digest_is_named(cluster, line):
    cluster.file("programs.txt").write_text(f"{'a' * 64} film 2x4\n{line}\n")
    approved = Approved.of(cluster)
    assert approved is not None
    # What stands there is not said: the owner is told, and the file may be another that was named by mistake.
    with pytest.raises(ValueError, match=r"programs\.txt, line 2 does not begin with 64 hex digits$"):
        approved.digests()


def test_a_file_that_anybody_may_change_or_that_never_ends_approves_nothing(cluster, program):
    path = cluster.file("programs.txt")
    approved = Approved.of(cluster)
    assert approved is not None
    path.write_text(f"{program.digest}\n")
    path.chmod(0o666)
    with pytest.raises(ValueError, match=r"anybody may change \S+programs\.txt \(mode 0666\): chmod o-w"):
        approved.digests()
    path.unlink()
    os.mkfifo(path)
    for use in (approved.digests, lambda: approved.add("film", {"2x4": program})):
        with pytest.raises(ValueError, match=r"programs\.txt is not a file"):
            use()
    path.unlink()


def swapped(w, one, other):
    """As `jointly` has it, but each gets the other's."""
    return [affine(w, *other), affine(w, *one)]


def test_a_party_takes_approved_programs_only(mortal):
    strict = mortal.changed("strict.toml", ('ca = "ca.pem"', 'ca = "ca.pem"\nprograms = "programs.txt"'))
    approved = Approved.of(strict)
    assert approved is not None
    approved.add("affine", {"2x4": compile_program(strict, lambda w, x: x @ w - 1, PLANNED, X, length=4)})
    mortal.restart(1, path=strict.path)
    refused = (
        r"^party 1 has not approved program 2x4 of model 'affine' \([0-9a-f]{16}\): who runs it says `flaxmpc approve"
    )
    with mortal.connect() as owner:
        with pytest.raises(secure.SecureError, match=refused):
            publish(owner)
        weights = owner.put(W)
        program = owner.program(affine, weights, X, length=4)
        approved.add("affine", {"2x4": program})
        code = secure.jit(swapped, parties=owner).compile(weights, (X,), (X,)).code
        with pytest.raises(secure.SecureError, match=refused):
            owner.publish("affine", weights, {"2x4": msgspec.structs.replace(program, joint={2: code})}, b"")
    check_served(mortal)  # what was approved counts without a restart


def scores(weights, x, keys):
    return {"scores": (x @ weights["w"]) * keys[:, None], "rows": x[:, 0]}


WEIGHTS = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)}
REQUESTS = [
    (np.full((2, 4), i, np.float32), np.arange(2, dtype=np.float32) + i) for i in range(3)
]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_request_gets_its_own_rows(count):
    together = jointly(scores)(WEIGHTS, *REQUESTS[:count])
    assert len(together) == count
    for request, output in zip(REQUESTS, together, strict=False):
        alone = scores(WEIGHTS, *request)
        assert output.keys() == alone.keys()
        for name in alone:
            np.testing.assert_allclose(output[name], alone[name], atol=1e-5)


def test_requests_of_other_sizes():
    small, large = (jnp.ones((1, 4)), jnp.ones(1)), (jnp.ones((3, 4)), jnp.ones(3))
    assert [output["rows"].shape for output in jointly(scores)(WEIGHTS, small, large)] == [(1,), (3,)]


def test_two_requests_take_the_rounds_of_one(group):
    alone = secure.jit(scores, parties=group("ABY3"))
    together = secure.jit(jointly(scores), parties=group("ABY3"))
    one = alone.run(WEIGHTS, *REQUESTS[0]).cost
    outputs, two = together.run(WEIGHTS, *REQUESTS[:2])
    assert two.rounds == one.rounds
    np.testing.assert_allclose(outputs[1]["scores"], scores(WEIGHTS, *REQUESTS[1])["scores"], atol=1e-3)
