"""What the preflight tells of data and models on the hub. Run: ./run_tests.sh tests/test_preflight_data.py"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import REPO

from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.plan import preflight
from trainers.warmup import Waiting
from trainers.weights import hub

URL = "/{repo_id}/resolve/{revision}/{filename}"
TINY = ["eval_dataset_split=null", "eval_size=64"]


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch, tmp_path):
    """No answer of an earlier test, nothing that was downloaded, and a network."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub._question.cache_clear()
    yield
    hub._question.cache_clear()


@pytest.fixture
def session(monkeypatch):
    """A function that lets the hub's answers be those of another one, given the URL."""
    import huggingface_hub

    def put(get):
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: type("Session", (), {"get": staticmethod(get)}))

    return put


@pytest.fixture
def a_hub(monkeypatch, session):
    """A server that answers as the hub does, for three data sets; returns the paths that it was asked for."""
    import httpx

    answers = {
        "/datasets/some/data/resolve/main/README.md": (200, ""),
        "/datasets/some/cardless/resolve/main/README.md": (404, "EntryNotFound"),
        "/datasets/some/gated/resolve/main/README.md": (403, "GatedRepo"),
    }
    asked = []
    monkeypatch.setattr(hub, "HUB_TIMEOUT", 60.0)
    monkeypatch.setattr(hub, "HUB_PATIENCE", 60.0)

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, code = answers.get(self.path, (401, "RepoNotFound"))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", where + URL)
    with httpx.Client(trust_env=False) as client:
        session(client.get)
        yield asked
    server.shutdown()
    server.server_close()


NONE = "the hub has none of this name, or it is private"


def told(*words, run="teacher_rlt_tiny", vram_gb=None):
    """The level and the message of each option that names models or data; presets and packages are not looked at."""
    return {f.check: (f.level, f.message) for f in preflight._look(run, [*TINY, *words], vram_gb).findings}


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("nosuch/typo-dataset", "error", f"cannot be had: {NONE}"),
        ("some/gated", "error", "cannot be had: it is gated"),
        ("some/data", "ok", "is on the hub"),
        ("hf://datasets/some/data", "ok", "is on the hub"),
        ("some/cardless", "ok", "is on the hub"),
        ("no name", "error", "cannot be had: Repo id must use"),
        ("buckets/some/bucket/folder", "warning", "is not looked for"),
        (str(REPO / "data/distances"), "ok", "is here"),
        (str(REPO / "data/distances/train.jsonl"), "ok", "is here"),
    ],
)
@pytest.mark.parametrize("key", ["dataset_id_or_path", "eval_dataset_id_or_path"])
def test_data_is_looked_for(key, name, level, message, a_hub):
    found = preflight._found(key, name)
    assert (found.check, found.level) == (key, level) and found.message.startswith(f"{name} {message}")
    assert (f"{key}=<a file or folder" in found.remedy) is (level == "error")
    assert len(a_hub) == (name.endswith(("dataset", "gated", "/data", "cardless")))
    preflight._found(key, name)
    assert len(a_hub) <= 1  # asked once


def test_a_run_whose_data_is_nowhere_could_not_work(a_hub):
    found = preflight.preflight("teacher_rlt_tiny", [*TINY, "dataset_id_or_path=nosuch/typo-dataset"])
    (finding,) = (f for f in found.findings if f.check == "dataset_id_or_path")
    assert finding.level == "error" and not found.works
    assert {"memory", "disk", "wandb", "model_name_or_path"} <= {f.check for f in found.findings}


def test_where_nothing_may_be_asked_data_that_was_downloaded_is_found(a_hub, monkeypatch, tmp_path):
    from datasets.naming import camelcase_to_snakecase

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "Some/MyHTML-Data17k"
    assert told(f"dataset_id_or_path={name}")["dataset_id_or_path"] == (
        "error",
        f"{name} is not here, and HF_HUB_OFFLINE=1",
    )
    kept = tmp_path / "datasets" / f"Some___{camelcase_to_snakecase('MyHTML-Data17k')}" / "default" / "0.0.0"
    for folder, level in (("7f.incomplete", "error"), ("7f", "ok")):
        (kept / folder).mkdir(parents=True)
        (kept / folder / "dataset_info.json").write_text("{}")
        assert preflight._found("dataset_id_or_path", name).level == level
    assert hub.is_prepared(f"hf://datasets/{name}") and not a_hub


def test_rows_that_datasets_has_kept_are_found(tmp_path):
    """As the library itself keeps them, whose names of folders these are."""
    from datasets import load_dataset

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "?"}) + "\n")
    load_dataset("json", data_files=str(rows), cache_dir=str(tmp_path / "datasets"))
    assert hub.is_prepared("json") and not hub.is_prepared("csv")


def test_data_that_a_warm_up_alone_reads_is_looked_for(a_hub, monkeypatch):
    its = load_options(compose_run("teacher_sft_tiny", ["dataset_id_or_path=some/gated"]), repo=REPO)
    options = load_options(compose_run("teacher_rlt_tiny", ["dataset_id_or_path=some/data", *TINY]), repo=REPO)
    sources = preflight._sources(options, [Waiting("before", its, REPO), Waiting("again", its, REPO)])
    assert [(name, path) for name, key, path in sources if key == "dataset_id_or_path"] == [
        ("", "some/data"),
        ("before", "some/gated"),
    ]
    (finding,) = (preflight._source(source) for source in sources if source[0])
    assert finding.check == "run:before" and finding.message.startswith("dataset_id_or_path: some/gated cannot be had")


@pytest.mark.parametrize("name", ["./nofolder", "~/nofolder", "/no/folder", "a/b/c"])
@pytest.mark.parametrize("key", ["dataset_id_or_path", "eval_dataset_id_or_path"])
def test_a_local_folder_that_is_not_there_is_a_fault(key, name):
    with pytest.raises(ConfigError) as refused:
        load_options(compose_run("teacher_rlt_tiny", [f"{key}='{name}'"]), repo=REPO)
    (fault,) = refused.value.faults
    assert (fault.key, fault.value) == (key, name) and fault.cause.startswith("there is no ")


def test_the_hub_is_asked_once_for_each_model_and_data(session):
    asked = []

    def get(url, **request):
        asked.append((url.rsplit("/resolve")[0].partition(".co/")[2], request["timeout"]))
        raise OSError("the line is dead")

    session(get)
    words = ["model_name_or_path=nobody/a", "student_model=nobody/b", "dataset_id_or_path=nobody/c"]
    levels = told(*words, run="teacher_rlt_mono_24gb", vram_gb=24)
    assert sorted(asked) == [("datasets/nobody/c", 1.0), ("nobody/a", 1.0), ("nobody/b", 1.0)]
    for key in ("model_name_or_path", "student_model", "dataset_id_or_path"):
        assert levels[key][0] == "warning"  # of a machine that is not this one
        assert levels[key][1].endswith("cannot be had: the line is dead")


def test_all_are_asked_at_the_same_time_and_who_does_not_answer_is_not_waited_for(session, monkeypatch):
    """A name server that does not answer heeds no timeout of a request."""
    asked, end = [], threading.Event()

    def get(url, **request):
        asked.append(url)
        end.wait()

    session(get)
    words = ["model_name_or_path=nobody/a", "student_model=nobody/b", "dataset_id_or_path=nobody/c"]
    levels = told(*words, run="teacher_rlt_mono_24gb", vram_gb=24)
    for key in ("model_name_or_path", "student_model", "dataset_id_or_path"):
        assert levels[key][1].endswith("be had: the hub has not answered in 1.5 s")
    assert len(asked) == 3
    end.set()


@pytest.mark.parametrize("slow", [True, False])
def test_a_hub_that_takes_its_time_is_no_reason_not_to_start(slow, session, monkeypatch):
    """A run that starts waits longer; one that cannot be reached is another thing."""
    import httpx

    error = httpx.ReadTimeout("The read operation timed out") if slow else httpx.ConnectError("no route")
    session(lambda url, **_: (_ for _ in ()).throw(error))
    found = preflight._found("dataset_id_or_path", "some/data")
    assert found.level == ("warning" if slow else "error") and str(error) in found.message
    monkeypatch.setattr(hub, "HUB_PATIENCE", 0.05)
    end = threading.Event()
    session(lambda url, **_: end.wait(10))
    found = preflight._found("model_name_or_path", "some/model")
    end.set()
    assert found.level == "warning" and "not answered in 0.05 s" in found.message
