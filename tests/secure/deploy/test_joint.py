import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.secure.deploy.joint import jointly


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
