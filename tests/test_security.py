"""What SECURITY.md says of code that might come with data: none runs, unless `trust_remote_code` lets it."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finch_rag.engine import Finch
from finch_rag.errors import InputError, ModelError, StoreError
from finch_rag.models.cache import CompressedCache
from finch_rag.models.loading import load_model
from tests.supply.projects import ROOT

from .small import chat_tokenizer, small_finch, small_model

SOURCES = sorted(
    file
    for package in ("finch_rag", "integrations/langchain-finch/langchain_finch", "integrations/*/llama_index")
    for folder in ROOT.glob(package)
    for file in folder.rglob("*.py")
)
# Whoever reads with these runs what the bytes say.
READERS = frozenset(("cloudpickle", "dill", "joblib", "marshal", "pickle", "runpy", "shelve", "yaml"))
CALLS = frozenset(
    ("eval", "exec", "__import__", "torch.load", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load")
)
CALLS |= {"os.system", "os.popen", "pd.read_pickle", "pandas.read_pickle"}


def code_runners(source: str) -> Iterator[str]:
    """Imports and calls that run what data says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in READERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in READERS and not node.level:
            yield str(node.module)
        elif isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in CALLS:
            yield called
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            yield "shell="


def test_nothing_here_runs_what_data_says() -> None:
    assert len(SOURCES) > 150
    found = {str(file.relative_to(ROOT)): [*code_runners(file.read_text(encoding="utf-8"))] for file in SOURCES}
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\nweights = torch.load('file')", "torch.load"),
        ("def f():\n    import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("from yaml.loader import Loader", "yaml.loader"),
        ("print(eval('1'))", "eval"),
        ("run('ls', shell=True)", "shell="),
    ],
)
def test_what_runs_data_is_seen(source: str, name: str) -> None:
    assert [*code_runners(source)] == [name]


def test_only_the_named_names_of_the_tables_are_queried() -> None:
    """SQL is made of constants and of names that the code has; values are bound."""
    text = (ROOT / "finch_rag" / "store" / "index.py").read_text(encoding="utf-8")
    module = ast.parse(text)
    formatted = [node for node in ast.walk(module) if isinstance(node, ast.JoinedStr)]
    constants = {ast.unparse(node.targets[0]) for node in module.body if isinstance(node, ast.Assign)}
    queries = [ast.unparse(node) for node in formatted if re.search(r"SELECT|INSERT|UPDATE|DELETE", ast.unparse(node))]
    inserted = {part for query in queries for part in re.findall(r"\{(.*?)\}", query)}
    assert inserted - constants == {"marks"}


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model whose weights are not in safetensors."""
    model = small_model("llama")
    place = tmp_path / "model"
    model.save_pretrained(place)
    chat_tokenizer().save_pretrained(place)
    (place / "model.safetensors").unlink()
    torch.save(dict(model.state_dict()), place / "pytorch_model.bin")
    return place


def test_a_pickle_in_the_place_of_weights_runs_nothing(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    content = pickle.dumps({"model.norm.weight": Touches(mark)})
    pickle.loads(content)
    assert mark.exists()  # it would
    mark.unlink()
    torch.save({"model.norm.weight": Touches(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load the model"):
        Finch.from_pretrained(folder, device="cpu")
    assert not mark.exists()


def test_weights_outside_of_safetensors_can_be_refused(folder: Path) -> None:
    assert load_model(folder, device="cpu").name == str(folder)  # read as tensors and nothing else, by transformers
    with pytest.raises(ModelError, match="safetensors"):
        Finch.from_pretrained(folder, device="cpu", model_kwargs={"use_safetensors": True})


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(
    folder: Path, tmp_path: Path, trusted: bool
) -> None:
    mark = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own-kind", "auto_map": {"AutoConfig": "own_kind.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own_kind.py").write_text(f"open({str(mark)!r}, 'w').close()\nOwnConfig = None\n", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot load the model"):
        Finch.from_pretrained(folder, device="cpu", trust_remote_code=trusted)
    assert mark.exists() is trusted


def test_a_pickle_in_the_place_of_a_cache_runs_nothing(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "cache.safetensors"
    torch.save(Touches(mark), file)
    with pytest.raises(InputError, match="cannot read the cache"):
        CompressedCache.load(file)
    assert not mark.exists()


def test_a_pickle_in_the_place_of_a_stores_keys_runs_nothing(tmp_path: Path) -> None:
    mark, finch = tmp_path / "ran", small_finch()
    store = finch.open_store(tmp_path / "store")
    store.add(["Ada Hall drew the maps of the coast."])
    store.close()
    (keys,) = (tmp_path / "store").glob("keys-*.safetensors")
    torch.save(Touches(mark), keys)
    with pytest.raises(StoreError, match="cannot be read"):
        finch.open_store(tmp_path / "store").retrieve("Who drew the maps?", 1)
    assert not mark.exists()
