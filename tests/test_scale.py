"""What docs/scale.md says of several proxies: they share nothing, so any load balancer will do."""
import contextlib

import pytest

for package in ("starlette", "uvicorn", "httpx"):
    pytest.importorskip(package, reason=f"needs the package {package} (extra serve)")

import httpx
from serve_fakes import MARKER, FakeDetector, FakeDetoxifier, FakeUpstream, completion, serving

from protector.guard import Protector
from protector.serve import ServeConfig, create_app

SAFE, HARMFUL = "Water boils at a lower temperature on a mountain.", f"You can mix {MARKER} in a closed bucket."
TURNS = [{"role": "user", "content": "What happens on a mountain?"}, {"role": "assistant", "content": SAFE}, {"role": "user", "content": "And then?"}]


def replica(upstream_url):
    guard = Protector(FakeDetector(), FakeDetoxifier(), threshold=0.5)
    return serving(create_app(guard, ServeConfig(upstream=upstream_url), check=lambda protector: None))  # a fake has no canaries


def ask(url):
    with httpx.Client(trust_env=False, timeout=30) as client:
        response = client.post(f"{url}/v1/chat/completions", json={"model": "fake", "messages": TURNS})
    assert response.status_code == 200
    return response.json()["choices"][0]["message"]["content"]


def test_two_replicas_answer_alike_and_one_goes_on_alone():
    upstream = FakeUpstream()
    with serving(upstream) as upstream_url, replica(upstream_url) as first:
        with contextlib.ExitStack() as second_lives:
            urls = [first, second_lives.enter_context(replica(upstream_url))]
            for answer in (SAFE, HARMFUL):
                upstream.json(completion(answer))
                # One conversation, its turns dealt to both as a load balancer would: no turn needs what the other saw.
                told = [ask(urls[turn % 2]) for turn in range(4)]
                assert len(set(told)) == 1 and (told[0] == answer) == (answer == SAFE) and MARKER not in told[0]
        assert ask(first) == told[0]
        with pytest.raises(httpx.ConnectError):
            ask(urls[1])
