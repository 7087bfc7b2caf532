"""What is pushed can be loaded by anybody, and a push that fails changes nothing."""

import json
import os
import random
import runpy
import signal
from multiprocessing import connection
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import AutoModelForMaskedLM, AutoTokenizer

import shared_bert
from shared_bert.hub import CheckpointPushes, PushError

from ..conftest import tiny_model
from ..far_side import WITHOUT_PACKAGE
from ..processes import interpret, start, wait
from .conftest import CLASSES, REPO, ROOT
from .hub_double import CUT, TOKEN

SCRIPT = ROOT / "scripts" / "push_to_hub.py"
LOAD = """
import json, sys
import transformers
from transformers import AutoTokenizer
auto, repo, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = getattr(transformers, auto).from_pretrained(repo, **options)
tokenizer = AutoTokenizer.from_pretrained(repo, **options)
inputs = tokenizer(["the fox hunts .", "the dog barks . the owl"], padding=True, return_tensors="pt")
print(json.dumps([type(model).__name__, type(tokenizer).__name__, model(**inputs).logits.tolist()]))
"""


def load_remotely(far, kind, repo=REPO, package=False, **options):
    """Loads by name in a fresh process, with or without the package; gives class names and logits."""
    code = ("import shared_bert\n" if package else WITHOUT_PACKAGE) + LOAD
    process = far("-c", code, CLASSES[kind][0], repo, json.dumps(options))
    assert process.returncode == 0, process.stderr
    model_class, tokenizer_class, logits = json.loads(process.stdout.splitlines()[-1])
    assert tokenizer_class == CLASSES[kind][1]
    return model_class, torch.tensor(logits)


def logits_of(model, folder):
    inputs = AutoTokenizer.from_pretrained(folder)(
        ["the fox hunts .", "the dog barks . the owl"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bert", {"attention_scheme": "pairwise", "depth_sharing": "masa", "num_atoms": 1}),
        ("gpt", {"attention_scheme": "query_free", "depth_sharing": "low_rank", "rank": 3}),
    ],
)
def test_anybody_can_load_what_is_pushed(hub, far, saved, kind, fields):
    model, folder = saved(kind, **fields)
    process = far(SCRIPT, folder, REPO, token=TOKEN)
    assert process.returncode == 0, process.stderr
    expected = logits_of(model, folder)
    for options in ({"trust_remote_code": True}, {"package": True}):
        model_class, logits = load_remotely(far, kind, **options)
        assert model_class == type(model).__name__
        torch.testing.assert_close(logits, expected)
    refused = far("-c", WITHOUT_PACKAGE + LOAD, CLASSES[kind][0], REPO, json.dumps({"trust_remote_code": False}))
    assert "trust_remote_code=True" in refused.stderr


@pytest.mark.slow
def test_as_stock_needs_no_code(hub, far, saved):
    model, folder = saved("bert", attention_scheme="shared")
    assert far(SCRIPT, folder, REPO, token=TOKEN).returncode == 0
    assert "modeling_shared_bert.py" in hub.repositories[REPO].files()
    assert far(SCRIPT, folder, REPO, "--as-stock", token=TOKEN).returncode == 0
    assert not [name for name in hub.repositories[REPO].files() if name.endswith(".py")]
    model_class, logits = load_remotely(far, "bert")
    assert model_class == "BertForMaskedLM"
    torch.testing.assert_close(logits, logits_of(model, folder), rtol=1e-5, atol=1e-5)


def test_what_is_pushed(hub, saved):
    model, folder = saved("bert", attention_scheme="pairwise")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    model = shared_bert.SharedBertForMaskedLM.from_pretrained(folder)
    model.push_to_hub(REPO, private=True, tag="v1", commit_message="all of it", source=folder)
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.messages == ["initial commit", "all of it"]
    assert repository.tags == {"v1": repository.branches["main"]}
    files = repository.files()
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "eval_results.json", "attention.py", "configuration_shared_attention.py", "configuration_shared_bert.py",
        "depth_sharing.py", "documents.py", "dropout.py", "ingredients.py", "loading.py", "losses.py",
        "modeling_shared_bert.py", "piecewise_attention.py", "projections.py", "schemes.py", "stock_names.py",
    }  # fmt: skip
    assert set(json.loads(files["config.json"])["auto_map"]) == {"AutoConfig", *model.config.auto_classes}
    for name, tensor in load(files["model.safetensors"]).items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_without_a_namespace_it_is_the_users(hub, saved):
    model, _ = saved("bert")
    assert model.push_to_hub("mine").repo_url.repo_id == "somebody/mine"
    assert '"somebody/mine"' in hub.repositories["somebody/mine"].files()["README.md"].decode()
    with hub.fault("whoami", 401), pytest.raises(PushError, match="nothing was uploaded"):
        model.push_to_hub("mine")


def test_revisions_leave_main_alone(hub, saved):
    model, folder = saved("bert")
    model.push_to_hub(REPO, source=folder)
    main = hub.repositories[REPO].branches["main"]
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight += 1
    model.push_to_hub(REPO, source=folder, revision="step-500")
    assert hub.repositories[REPO].branches["main"] == main
    revisions = [AutoModelForMaskedLM.from_pretrained(REPO, revision=name) for name in ("main", "step-500")]
    difference = revisions[1].get_input_embeddings().weight - revisions[0].get_input_embeddings().weight
    torch.testing.assert_close(difference, torch.ones_like(difference))
    assert 'revision="step-500"' in hub.repositories[REPO].files("step-500")["README.md"].decode()


def test_a_branch_has_results_of_its_own_only(hub, saved):
    model, folder = saved("bert")
    (folder / "loss_curve.json").write_text("{}")
    model.push_to_hub(REPO, source=folder)
    assert {"eval_results.json", "loss_curve.json"} <= set(hub.repositories[REPO].files())
    hub.repositories[REPO].files()["pytorch_model.bin"] = b"of an earlier time"
    model.push_to_hub(REPO, revision="step-500")
    files = hub.repositories[REPO].files("step-500")
    assert not {"eval_results.json", "loss_curve.json", "pytorch_model.bin"} & set(files)
    assert "None were recorded" in files["README.md"].decode()


def test_the_tokenizer_comes_from_the_hub_as_well(hub, saved, monkeypatch):
    model, folder = saved("bert")
    model.push_to_hub(REPO, source=folder)
    monkeypatch.setattr("shared_bert.folders.snapshot_download", lambda name, **kwargs: str(folder))
    again = shared_bert.SharedBertForMaskedLM.from_pretrained(REPO)
    assert again.name_or_path == REPO
    again.push_to_hub("somebody/copy")
    assert "tokenizer.json" in hub.repositories["somebody/copy"].files()


def test_a_pull_request_leaves_main_alone(hub, saved):
    model, _ = saved("bert")
    model.push_to_hub(REPO)
    main = hub.repositories[REPO].branches["main"]
    commit = model.push_to_hub(REPO, create_pr=True, commit_message="please")
    assert commit.pr_url.endswith("discussions/1")
    assert hub.repositories[REPO].branches["main"] == main


def test_a_public_repository_does_not_take_what_is_private(hub, saved):
    model, _ = saved("bert")
    model.push_to_hub(REPO)
    with pytest.raises(ValueError, match="somebody/model already exists and is public"):
        model.push_to_hub(REPO, private=True)
    assert len(hub.repositories[REPO].messages) == 2


def test_a_full_disk(hub, saved, monkeypatch):
    model, _ = saved("bert")

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(PushError, match=r"could not be prepared .*No space left.*; nothing was uploaded"):
        model.push_to_hub(REPO)


def test_shards_that_are_no_longer_needed_go(hub, saved):
    model, _ = saved("bert")
    model.push_to_hub(REPO, max_shard_size="20KB")
    assert "model.safetensors.index.json" in hub.repositories[REPO].files()
    hub.repositories[REPO].files()["handler.py"] = b"the user's own"
    model.push_to_hub(REPO)
    weights = {name for name in hub.repositories[REPO].files() if ".safetensors" in name}
    assert weights == {"model.safetensors"}
    assert hub.repositories[REPO].files()["handler.py"] == b"the user's own"


@pytest.mark.parametrize(
    ("request_", "fault", "said"),
    [
        ("POST /api/", 401, "401"),
        ("POST /api/", 403, "403"),
        ("GET .*/refs", CUT, ""),
        ("POST .*/preupload/", 403, "403"),
        ("POST .*/objects/batch", 400, "400"),
        ("PUT /lfs/", 403, "403"),
        ("PUT /lfs/", CUT, ""),
        ("POST .*/commit/", 409, "409"),
        ("POST .*/commit/", 500, "500"),
        ("POST .*/commit/", 503, "503"),
        ("POST .*/commit/", CUT, ""),
    ],
)
def test_a_push_that_fails_leaves_the_last_revision(hub, saved, request_, fault, said, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    model, folder = saved("bert")
    model.push_to_hub(REPO, source=folder)
    expected = logits_of(model, folder)
    main = hub.repositories[REPO].branches["main"]
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight += 1
    with hub.fault(request_, fault), pytest.raises(PushError) as failed:
        model.push_to_hub(REPO, source=folder)
    assert f"nothing was committed: main is at {main[:8]}, as before" in str(failed.value)
    assert said in str(failed.value)
    assert TOKEN not in str(failed.value)
    assert hub.repositories[REPO].branches["main"] == main
    before = AutoModelForMaskedLM.from_pretrained(REPO)
    torch.testing.assert_close(logits_of(before, folder), expected)
    model.push_to_hub(REPO, source=folder)
    assert hub.repositories[REPO].branches["main"] != main


def test_what_the_hub_says_is_told(hub, saved):
    model, _ = saved("bert")
    with hub.fault("POST .*/preupload/", 403), pytest.raises(PushError, match="the double was told to answer 403"):
        model.push_to_hub(REPO)


def test_a_hub_that_is_gone(hub, saved, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    model, _ = saved("bert")
    with hub.fault(".", CUT), pytest.raises(PushError, match="what the Hub holds now is not known"):
        model.push_to_hub(REPO)


def test_a_commit_by_somebody_else_is_not_overwritten(hub, saved, monkeypatch):
    model, _ = saved("bert")
    model.push_to_hub(REPO)
    repository = hub.repositories[REPO]
    route = hub._route

    def interfere(method, path, headers, body):
        if "/preupload/" in path:
            repository.commit("main", {**repository.files(), "theirs": b""}, "in between")
        return route(method, path, headers, body)

    monkeypatch.setattr(hub, "_route", interfere)
    with pytest.raises(PushError, match=r"main was at \w{8} and is at \w{8} now"):
        model.push_to_hub(REPO, commit_message="late")
    assert repository.messages[-1] == "in between"


@pytest.mark.parametrize(
    ("options", "said"),
    [({"repo_id": "a/b/c"}, "'a/b/c' is not a valid name of a repository"), ({"tag": "v1"}, "already has a tag 'v1'")],
)
def test_what_is_refused_before_an_upload(hub, saved, options, said):
    model, _ = saved("bert")
    model.push_to_hub(REPO, tag="v1")
    hub.requests.clear()
    with pytest.raises(ValueError, match=said):
        model.push_to_hub(**{"repo_id": REPO} | options)
    assert not [request for request in hub.requests if "commit" in request or "lfs" in request]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nowhere", REPO], "nowhere"), (["bare", REPO], "no tokenizer"), (["broken", REPO], "broken")],
)
def test_the_script_refuses_what_is_not_whole(hub, saved, tmp_path, monkeypatch, capsys, arguments, said):
    main = runpy.run_path(str(SCRIPT))["main"]
    tiny_model("bert", vocab_size=320).save_pretrained(tmp_path / "bare")
    _, folder = saved("bert", name="broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert REPO not in hub.repositories


@pytest.mark.slow
def test_a_killed_push_can_be_done_again(hub, saved, far, tmp_path, monkeypatch):
    """Killed at random requests, a push has changed nothing or all."""
    model, folder = saved("bert")
    log = tmp_path / "log"
    assert far(SCRIPT, folder, REPO, token=TOKEN).returncode == 0
    hub.requests.clear()
    assert far(SCRIPT, folder, REPO, token=TOKEN).returncode == 0
    number_of_requests = len(hub.requests)
    route = hub._route
    seed = random.SystemRandom().randrange(2**32)
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    for moment in random.Random(seed).sample(range(number_of_requests), 3):
        print(f"seed {seed}: killed at request {moment + 1} of {number_of_requests}")
        before = hub.repositories[REPO].branches["main"]
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight += 1
        model.save_pretrained(folder)
        process = start(
            interpret, [str(SCRIPT), str(folder), REPO], environment={**os.environ, **environment}, log=log
        )
        until = iter(range(moment))

        def kill(method, path, headers, body, process=process, until=until):
            answer = route(method, path, headers, body)
            if next(until, None) is None:
                process.kill()
                connection.wait([process.sentinel])  # not join(): only one thread can read the status
                raise ConnectionAbortedError
            return answer

        monkeypatch.setattr(hub, "_route", kill)
        assert wait(process, log) == -signal.SIGKILL
        monkeypatch.setattr(hub, "_route", route)
        found = load(hub.repositories[REPO].files()["model.safetensors"])["bert.embeddings.word_embeddings.weight"]
        is_new = torch.equal(found, model.get_input_embeddings().weight)
        assert is_new == (hub.repositories[REPO].branches["main"] != before)
    assert far(SCRIPT, folder, REPO, token=TOKEN).returncode == 0
    loaded = AutoModelForMaskedLM.from_pretrained(REPO)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.slow
def test_the_token_is_nowhere_to_be_found(hub, far, saved, tmp_path):
    _, folder = saved("bert")
    done = far(SCRIPT, folder, REPO, token=TOKEN, HF_DEBUG="1")
    assert done.returncode == 0, done.stderr
    with hub.fault("POST .*/commit/", 403):
        refused = far(SCRIPT, folder, REPO, token=TOKEN)
    assert refused.returncode == 2
    assert "push_to_hub.py: the push to somebody/model failed" in refused.stderr
    assert "Traceback" not in refused.stderr
    for process in (done, refused):
        assert TOKEN not in process.stdout + process.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_checkpoint_that_cannot_be_pushed_does_not_stop_training(hub, saved, caplog):
    class Training(CheckpointPushes):
        args = SimpleNamespace(hub_strategy="every_save", hub_always_push=False, hub_revision=None, hub_token=None)
        state = SimpleNamespace(global_step=5)
        callback_handler = SimpleNamespace(on_push_begin=lambda *arguments: None)
        control = push_in_progress = None
        hub_model_id = REPO

        def is_world_process_zero(self):
            return True

    _, folder = saved("bert")
    (folder / "trainer_state.json").write_text("{")
    Training()._push_from_checkpoint(str(folder))
    assert "saved is not pushed" in caplog.text
    assert "trainer_state.json is damaged" in caplog.text
    assert REPO not in hub.repositories
