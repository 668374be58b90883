"""The server under Ray Serve, and tables by Ray Data: two replicas on this machine. Skipped where Ray is not installed.

Run by ``make test-ray``.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from finch_rag import Finch, Passage
from finch_rag.errors import InputError, SettingsError
from finch_rag.ray_data import AskBatch, answer_table
from finch_rag.serve.settings import ServeSettings

from ..small import texts
from .support import ASKED, CHAT, DOCUMENTS, QUESTION, error_in, events_of

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "heads": [(0, 1), (1, 2)],
    "alone_heads": [(0, 1), (1, 2)],
    "dtype": "float32",
    "device": "cpu",
    "max_new_tokens": 8,
    "instructions": "Answer.",
    "system_prompt": "",
    "budget": 60,
}
REPLICA = "x-finch-replica"
ROOT = Path(__file__).parents[2]
LONG, MANY = texts(3, seed=1), 1500  # documents about which the small model does not stop before so many tokens
PATIENCE = 90.0  # seconds for a replica to be there, on a machine that has other work


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, small."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def url(cluster: None, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where two replicas answer."""
    from finch_rag.serve.ray_app import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {  # as texts, as `serve run` has them
        "model": model_folder,
        "name": "small",
        "num_replicas": "2",
        "engine": json.dumps({**SETTINGS, "store": True}),  # what came before is not read again
        "stores": str(tmp_path_factory.mktemp("stores")),
        "ray_actor_options": '{"num_cpus": 0.5}',
        "max_body_mib": "1",
    }
    serve.run(build(arguments))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client


def ask(client: httpx.Client, documents: Any, question: str = "When?", **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": question}]
    return client.post(CHAT, json={"messages": messages, "documents": documents, **fields})


def lists(count: int) -> list[list[str]]:
    return [texts(3, seed=seed) for seed in range(count)]


def wait_for_replicas(client: httpx.Client) -> None:
    """Until there are two."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if len({ask(client, own).headers.get(REPLICA) for own in lists(12)}) == 2:
            return
        time.sleep(0.5)
    pytest.fail("there are no two replicas")


def kill(replica: str) -> None:
    """Ends an engine's process at once."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].endswith(f"engine#{replica}"):
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
            return
    pytest.fail(f"there is no replica {replica}")


# The server


def test_different_documents_spread_over_both_replicas(client: httpx.Client) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda own: ask(client, own), lists(16)))
    assert [answer.status_code for answer in answers] == [200] * 16
    used = [answer.headers[REPLICA] for answer in answers]
    assert len(set(used)) == 2
    assert all(used.count(replica) >= 2 for replica in set(used))


def test_the_same_documents_go_to_the_same_replica(client: httpx.Client) -> None:
    for own in lists(4):
        with ThreadPoolExecutor(4) as pool:
            asked = list(pool.map(lambda n, own=own: ask(client, own[::-1] if n % 2 else own, f"When {n}?"), range(6)))
        assert len({answer.headers[REPLICA] for answer in asked}) == 1
        usage = ask(client, own, "Who?").json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["finch"]["context_tokens"] > 0


def test_answers_are_the_engine_s(client: httpx.Client, model_folder: str) -> None:
    finch = Finch.from_pretrained(model_folder, **SETTINGS)
    passages = [Passage(d["text"], d["id"], d.get("title")) for d in DOCUMENTS]
    done = client.post(CHAT, json={"messages": ASKED, "documents": DOCUMENTS}).json()
    assert done["model"] == "small"
    assert (
        done["choices"][0]["message"]["content"] == finch.chat([{"role": "user", "content": QUESTION}], passages).text
    )


def test_streams_come_in_pieces(client: httpx.Client) -> None:
    whole = client.post(CHAT, json={"messages": ASKED, "documents": DOCUMENTS, "max_tokens": 40}).json()
    pieces = []
    fields = {"messages": ASKED, "documents": DOCUMENTS, "max_tokens": 40, "stream": True}
    with client.stream("POST", CHAT, json=fields) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert REPLICA in response.headers
        times = []
        for piece in response.iter_text():
            pieces.append(piece)
            times.append(time.monotonic())
    deltas = [event["choices"][0]["delta"].get("content") or "" for event in events_of("".join(pieces))]
    assert "".join(deltas) == whole["choices"][0]["message"]["content"]
    assert len(pieces) > 5
    assert times[-1] > times[0]


def test_a_client_that_goes_away_ends_its_answer(client: httpx.Client) -> None:
    def figure(replica: str, name: str) -> float:
        """Of a replica; requests without a key reach it sooner or later."""
        while (told := client.get("/metrics")).headers[REPLICA] != replica:
            time.sleep(0.02)
        return float(next(line for line in told.text.splitlines() if line.startswith(name)).split()[-1])

    generated = 'finch_tokens_total{kind="generated"}'
    replica = ask(client, LONG, max_tokens=MANY).headers[REPLICA]
    with_one = figure(replica, generated)
    assert with_one >= MANY
    asked = [{"role": "user", "content": "When?"}]
    fields = {"messages": asked, "documents": LONG, "max_tokens": MANY, "stream": True}
    with client.stream("POST", CHAT, json=fields) as response:
        assert response.headers[REPLICA] == replica
        next(response.iter_lines())
    end = time.monotonic() + PATIENCE
    while figure(replica, "finch_running") and time.monotonic() < end:
        time.sleep(0.1)
    assert figure(replica, "finch_running") == 0
    assert figure(replica, generated) < with_one + MANY  # it has not gone on to its end


def test_errors_keep_their_shape(client: httpx.Client) -> None:
    assert "messages" in error_in(client.post(CHAT, json={"documents": DOCUMENTS}), 400)["message"]
    assert (
        "not JSON"
        in error_in(client.post(CHAT, content=b"{", headers={"Content-Type": "application/json"}), 400)["message"]
    )
    assert error_in(client.get("/nowhere"), 404)
    assert error_in(ask(client, ["x" * (2**20 + 1)]), 413)["code"] == "body_too_large"


def test_a_store_stays_with_one_replica(client: httpx.Client) -> None:
    for name in ("ferry", "mill", "quay", "light"):
        assert client.post("/v1/stores", json={"name": name}).status_code == 201
        kept = client.post(f"/v1/stores/{name}/passages", json={"passages": DOCUMENTS})
        assert kept.json()["added"] == 3
        asked = [client.post(CHAT, json={"messages": ASKED, "store": name}) for _ in range(3)]
        assert {answer.headers[REPLICA] for answer in asked} == {kept.headers[REPLICA]}
        assert asked[0].json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert {s["name"] for s in client.get("/v1/stores").json()["data"]} == {"ferry", "mill", "quay", "light"}
    assert client.delete("/v1/stores/quay").json()["deleted"]


def test_a_lost_replica_loses_no_request(client: httpx.Client) -> None:
    """One replica is killed in the midst of answers; each request is answered all the same, by the other one."""
    wait_for_replicas(client)
    victim = ask(client, LONG).headers[REPLICA]
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(ask, client, LONG, max_tokens=MANY, finch={"quotes": False}) for _ in range(6)]
        time.sleep(0.3)
        assert not any(answer.done() for answer in waiting)
        kill(victim)
        answers = [answer.result(PATIENCE) for answer in waiting]
    assert [answer.status_code for answer in answers] == [200] * 6
    assert victim not in {answer.headers[REPLICA] for answer in answers}
    wait_for_replicas(client)  # Ray starts another one


def test_a_stream_that_breaks_says_so(client: httpx.Client) -> None:
    wait_for_replicas(client)
    fields = {"messages": [{"role": "user", "content": "When?"}], "documents": LONG, "max_tokens": MANY, "stream": True}
    with client.stream("POST", CHAT, json=fields) as response:
        pieces = response.iter_text()
        text = next(pieces)
        kill(response.headers[REPLICA])
        text += "".join(pieces)
    last = [line for line in text.split("\n\n") if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    wait_for_replicas(client)


def test_what_cannot_be_deployed_says_so() -> None:
    from finch_rag.serve.ray_app import RayOptions, build

    with pytest.raises(SettingsError, match=r"replicas: Extra inputs.*num_replicas"):
        build({"replicas": 2})
    with pytest.raises(SettingsError, match="num_replicas"):
        build({"num_replicas": 0})
    with pytest.raises(SettingsError, match="engine"):
        build({"engine": "{"})
    assert RayOptions(running=3).settings() == ServeSettings(running=3)


def test_ray_s_own_options_reach_the_engines() -> None:
    from finch_rag.serve.ray_app import build

    scaling = {"min_replicas": 1, "max_replicas": 4}
    app = build({"autoscaling_config": json.dumps(scaling), "ray_actor_options": {"num_gpus": 0.5}, "running": 5})
    engine = app._bound_deployment.init_args[0]._bound_deployment
    assert engine.ray_actor_options["num_gpus"] == 0.5
    assert engine._deployment_config.autoscaling_config.max_replicas == 4
    assert engine.max_ongoing_requests == 5


def test_the_example_of_kuberay_is_what_ray_takes() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from finch_rag.serve.ray_app import RayOptions

    described = yaml.safe_load((ROOT / "examples" / "deploy" / "rayservice.yaml").read_text())
    found = ServeDeploySchema.model_validate(yaml.safe_load(described["spec"]["serveConfigV2"]))
    RayOptions.model_validate(found.applications[0].args)


# Tables


def test_map_batches_answers_as_the_engine_does(cluster: None, model_folder: str) -> None:
    finch = Finch.from_pretrained(model_folder, **SETTINGS)
    table: list[dict[str, Any]] = [
        {"n": n, "question": f"token{n}?" if n != 5 else "", "passages": texts(3, seed=n)} for n in range(8)
    ]
    for batch_format in ("pyarrow", "numpy", "pandas"):
        data = ray.data.from_items(table).map_batches(
            AskBatch,
            fn_constructor_args=[model_folder],
            fn_constructor_kwargs=SETTINGS,
            batch_size=4,
            batch_format=batch_format,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0.5,
        )
        found = sorted(data.take_all(), key=lambda row: int(row["n"]))
        assert [bool(row["error"]) for row in found] == [n == 5 for n in range(8)]
        for row, asked in zip(found, table, strict=True):
            if not row["error"]:
                answer = finch.ask(asked["question"], asked["passages"])
                assert row["answer"] == answer.text
                assert [c["index"] for c in row["citations"]] == [c.index for c in answer.citations]


def test_workers_answer_a_table(cluster: None, model_folder: str, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = tmp_path / "questions.parquet"
    many = {"question": [f"token{n}?" for n in range(9)], "passages": [texts(3, seed=n) for n in range(9)]}
    parquet.write_table(pa.table(many), table)
    again: dict[str, Any] = {"model": model_folder, "block_rows": 2, **SETTINGS}
    answer_table(table, tmp_path / "alone", **again)
    workers: dict[str, Any] = {"workers": 2, "worker_options": {"num_cpus": 0.25}, **again}
    assert answer_table(table, tmp_path / "many", **workers) == 9
    assert answer_table(table, tmp_path / "many", **workers) == 0
    expected = parquet.read_table(tmp_path / "alone")
    assert parquet.read_table(tmp_path / "many").sort_by("row").to_pydict() == expected.to_pydict()
    with pytest.raises(InputError, match="no column 'q'"):
        answer_table(table, tmp_path / "wrong", **{**workers, "question": "q"})
