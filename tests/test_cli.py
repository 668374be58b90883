import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finch_rag import Finch, __version__, cli
from finch_rag.cli import session
from finch_rag.heads.stored import load_heads
from finch_rag.terminal import output as display

from .command_line import one_error, only_json, run

QUESTION = "Who built the lighthouse on the rock?"
LIGHTHOUSE = "island.md#lighthouse"


@pytest.mark.usefixtures("hashed")
def test_ask_in_json(corpus: Path, model_folder: str) -> None:
    result = run(
        *("ask", QUESTION, "--corpus", corpus, "--model", model_folder, "--top-k", 2, "--budget", 40),
        *("--chunk-size", 100, "--max-new-tokens", 5, "--selection", "token", "--json"),
    )
    shown = only_json(result)
    assert list(shown) == ["question", "answer", "citations", "statements", "support", "report"]
    assert shown["question"] == QUESTION
    assert isinstance(shown["answer"], str)
    assert {citation["passage_id"] for citation in shown["citations"]} == {LIGHTHOUSE, "island.md#harbour"}
    read_first = next(citation for citation in shown["citations"] if citation["index"] == 0)
    assert read_first["passage_id"] == LIGHTHOUSE  # rank order
    report = shown["report"]
    assert (report["passages"], report["budget"], report["chunk_size"]) == (2, 40, 100)
    assert (report["selection"], report["kept_tokens"]) == ("token", 40)
    assert report["new_tokens"] <= 5


@pytest.mark.usefixtures("hashed")
def test_ask_in_words(corpus: Path, model_folder: str) -> None:
    result = run("ask", QUESTION, "--corpus", corpus, "--model", model_folder, "--budget", 60)
    shown = only_json(run("ask", QUESTION, "--corpus", corpus, "--model", model_folder, "--budget", 60, "--json"))
    assert result.exit_code == 0
    assert shown["report"]["passages"] == 3  # top-k is the whole of a small corpus
    assert result.stdout.startswith(display.printable(shown["answer"]))
    lines = result.stdout.splitlines()
    (cited,) = [line for line in lines if shown["citations"][0]["passage_id"] in line]
    best = shown["citations"][0]
    assert f"{best['share']:.1%}" in cited
    assert f"{best['kept_tokens']}/{best['passage_tokens']}" in cited
    report = shown["report"]
    assert f"{report['context_tokens']:,} tokens of 3 passages" in result.stdout
    assert f"{report['kept_tokens']} tokens of" in result.stdout
    assert f"{report['compression_factor']:.1f} times fewer" in result.stdout
    assert f"{report['kv_bytes_full'] / 2**20:,.1f} MiB" in result.stdout
    assert "\x1b" not in result.output


@pytest.mark.usefixtures("hashed")
def test_ask_shows_quotes_on_request(corpus: Path, model_folder: str) -> None:
    args = ("ask", QUESTION, "--corpus", corpus, "--model", model_folder, "--budget", 200)
    shown = only_json(run(*args, "--json"))
    assert shown["statements"]
    assert shown["report"]["quote_seconds"] > 0
    lines = run(*args, "--quotes").stdout.splitlines()
    for statement in shown["statements"]:
        numbers = "".join(f"[{source['index'] + 1}]" for source in statement["sources"])
        assert any(line.endswith(f" {numbers}") for line in lines)
        for source in statement["sources"]:
            for quote in source["quotes"]:
                assert f"  [{source['index'] + 1}] {quote['share']:.0%}  {' '.join(quote['text'].split())}" in lines
    assert not any(line.startswith("  [") for line in run(*args).stdout.splitlines())


@pytest.mark.usefixtures("hashed")
def test_streaming_shows_the_pieces_of_the_answer_once(
    corpus: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(display, "say_delta", pieces.append)
    args = ("ask", QUESTION, "--corpus", corpus, "--model", model_folder)
    answer = only_json(run(*args, "--stream", "--json"))["answer"]
    assert pieces == []
    run(*args)
    assert pieces == []  # no terminal
    streamed = run(*args, "--stream")
    assert "".join(pieces) == answer
    assert len(pieces) > 1
    assert not streamed.stdout.startswith(answer[:5])


@pytest.mark.usefixtures("hashed")
def test_rank_lists_all_passages_by_share(corpus: Path, model_folder: str) -> None:
    args = ("rank", QUESTION, "--corpus", corpus, "--model", model_folder)
    shown = only_json(run(*args, "--json"))
    assert list(shown) == ["question", "citations"]
    shares = [citation["share"] for citation in shown["citations"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    assert len(shares) == 3
    assert only_json(run(*args, "--json", "--limit", 2))["citations"] == shown["citations"][:2]
    assert len(only_json(run(*args, "--json", "--top-k", 2))["citations"]) == 2
    table = run(*args).stdout
    assert all(citation["passage_id"] in table for citation in shown["citations"])
    assert "[red]Museum[/red]" in table  # a title is text, not markup


@pytest.mark.usefixtures("hashed")
def test_heads_are_found_and_stored(model_folder: str) -> None:
    shown = only_json(run("heads", model_folder, "--n", 3, "--json"))
    assert len(shown["heads"]) == 3
    assert Path(shown["file"]).is_file()
    stored = load_heads(Finch.from_pretrained(model_folder, heads="all").model)
    assert stored == [(head["layer"], head["head"]) for head in shown["heads"]]
    alone = load_heads(Finch.from_pretrained(model_folder, heads="all").model, "alone")
    assert alone == [(head["layer"], head["head"]) for head in shown["alone_heads"]]
    assert len(only_json(run("heads", model_folder, "--n", 3, "--n-alone", 2, "--json"))["alone_heads"]) == 2
    table = run("heads", model_folder, "--n", 3).stdout
    assert f"stored in {shown['file']}" in table.replace("\n", "")
    assert "the loop" in table
    assert "a store" in table


@pytest.mark.usefixtures("hashed")
def test_heads_are_found_on_ones_own_examples(model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    passages = ["The mill burnt down in 1931.", "The harbour was built by Clara Novak.", "Hugo Kessler lit the lamp."]
    for gold in (1, 2):
        file.write_text(json.dumps({"question": "Who built the harbour?", "passages": passages, "gold": gold}))
        scores = [
            only_json(run("heads", model_folder, "--n", 3, *own, "--json"))["heads"]
            for own in ((), ("--examples", file))
        ]
        assert scores[0] != scores[1]
    file.write_text(json.dumps({"question": "Who?", "passages": passages, "gold": 3}))
    error = one_error(run("heads", "no/such-model", "--examples", file))
    assert "mine.jsonl, line 1: gold is 3: name one of the passages 0 to 2" in error
    assert "nowhere.jsonl do not exist" in one_error(run("heads", "no/such-model", "--examples", "nowhere.jsonl"))


def test_bench_speed_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    speed = ModuleType("finch_rag.bench.speed")
    speed.main = lambda **options: seen.append(options)  # type: ignore[attr-defined]
    package = ModuleType("finch_rag.bench")
    package.speed = speed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "finch_rag.bench", package)
    monkeypatch.setitem(sys.modules, "finch_rag.bench.speed", speed)
    assert run("bench", "speed").exit_code == 0
    run("bench", "speed", "--model", "m", "--tokens", "10, 20", "--budget", 5, "--repeats", 1, "--methods", "finch")
    run("bench", "speed", "--shape", "tiny", "--plot", "speed.png")
    default = {"model": "embedded", "tokens": [8192, 32768], "budget": 512, "chunk_size": None, "repeats": 3}
    default |= {"shape": None, "plot": None}
    assert seen[0] == {**default, "methods": ["full", "finch"]}
    assert seen[1] == {**default, "model": "m", "tokens": [10, 20], "budget": 5, "repeats": 1, "methods": ["finch"]}
    assert seen[2] == {**default, "methods": ["full", "finch"], "shape": "tiny", "plot": Path("speed.png")}
    assert run("bench", "speed", "--tokens", "many").exit_code == 2
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("args", "messages"),
    [
        (("", "--corpus", "CORPUS"), ["question is empty"]),
        ((" \n", "--corpus", "CORPUS"), ["question is empty"]),
        (("\udcff", "--corpus", "CORPUS"), ["question is not valid UTF-8"]),
        (("Who?", "--corpus", "nowhere"), ["corpus nowhere does not exist"]),
        (("Who?", "--corpus", "CORPUS", "--top-k", "4"), ["top-k is 4", "has 3 passages", "use 3 or less"]),
        (("Who?", "--corpus", "CORPUS", "--model", "no/such-model"), ["cannot load the model 'no/such-model'"]),
    ],
)
@pytest.mark.parametrize("command", ["ask", "rank"])
def test_bad_input_is_one_line_and_exit_code_2(
    corpus: Path, command: str, args: tuple[str, ...], messages: list[str]
) -> None:
    line = one_error(run(command, *(str(corpus) if arg == "CORPUS" else arg for arg in args), "--json"))
    assert all(message in line for message in messages)


@pytest.mark.usefixtures("hashed")
@pytest.mark.parametrize(
    ("option", "value", "messages"),
    [
        ("--budget", 3000, ["budget 3000 is too large", "window of 2048", "budget="]),
        ("--chunk-size", 2040, ["chunk_size 2040 is too large", "chunk_size="]),
        ("--max-new-tokens", 2048, ["no room", "2048"]),
    ],
)
def test_what_does_not_fit_the_window(
    corpus: Path, model_folder: str, option: str, value: int, messages: list[str]
) -> None:
    line = one_error(run("ask", "Who?", "--corpus", corpus, "--model", model_folder, option, value))
    assert all(message in line for message in messages)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("ask", "--budget", 0),
        ("ask", "--chunk-size", -1),
        ("ask", "--max-new-tokens", 0),
        ("ask", "--top-k", 0),
        ("rank", "--top-k", -1),
        ("rank", "--limit", 0),
    ],
)
def test_numbers_below_one(corpus: Path, command: str, option: str, value: int) -> None:
    line = one_error(run(command, "Who?", "--corpus", corpus, option, value))
    assert f"{option.strip('-')} is {value}: the least is 1" in line


def test_numbers_below_one_without_a_corpus() -> None:
    assert "--n is 0" in one_error(run("heads", "embedded", "--n", 0))
    assert "--limit is 0" in one_error(run("demo", "--all", "--limit", 0))
    assert "--repeats is 0" in one_error(run("bench", "speed", "--repeats", 0))


@pytest.mark.parametrize(
    "args",
    [
        ("ask",),
        ("ask", "Who?"),
        ("ask", "Who?", "--corpus", "x", "--budget", "many"),
        ("ask", "Who?", "--corpus", "x", "--selection", "words"),
        ("ask", "Who?", "--corpus", "x", "--cutoff", "1.5"),
        ("demo", "--limit", "2"),
        ("nothing",),
    ],
)
def test_bad_usage_is_exit_code_2(args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.usefixtures("hashed")
def test_warnings_about_the_corpus_go_to_stderr(corpus: Path, model_folder: str) -> None:
    (corpus / "latin.txt").write_bytes(b"\xe4\xf6\xfc")
    result = run("ask", QUESTION, "--corpus", corpus, "--model", model_folder, "--json")
    assert only_json(result)["report"]["passages"] == 3
    assert "Note: latin.txt is not UTF-8" in result.stderr


def test_a_folder_that_cannot_be_written_is_one_line(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", "some folder")

    monkeypatch.setattr(session, "read_corpus", refuse)
    assert "Permission denied: 'some folder'" in one_error(run("ask", "Who?", "--corpus", corpus))


def test_ctrl_c_is_exit_code_130(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "read_corpus", interrupt)
    result = run("ask", "Who?", "--corpus", corpus)
    assert result.exit_code == 130
    assert "Traceback" not in result.output


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_extra_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"Error: {package} is not installed; install it with: pip install 'finch-rag[cli]'"


def test_version_and_help_load_no_model_library() -> None:
    assert run("--version").stdout == f"finch-rag {__version__}\n"
    code = "import sys, finch_rag.cli.app; print(*sys.modules)"
    modules = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not modules & {"torch", "transformers", "faiss"}


@pytest.mark.parametrize(
    "command",
    [
        *((), ("ask",), ("rank",), ("index",), ("demo",), ("heads",)),
        *(("store",), ("store", "info"), ("store", "verify"), ("store", "clear")),
        *(
            ("bench",),
            ("bench", "speed"),
            ("bench", "many"),
            ("bench", "load"),
            ("bench", "soak"),
            ("bench", "quality"),
            ("bench", "positions"),
            ("bench", "recall"),
            ("bench", "kept"),
        ),
    ],
)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    assert "\\[" not in result.stdout  # an escape that markup left over


def test_control_characters_of_untrusted_text_do_not_reach_the_terminal() -> None:
    assert display.printable("a\x1b[31mb\x07\u202e\n\tc\u00e9") == "a\\x1b[31mb\\x07\\u202e\n\tc\u00e9"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_progress_is_on_stderr_of_a_terminal_only() -> None:
    code = (
        "from finch_rag.terminal.output import say_json\nfrom finch_rag.terminal.progress import ProgressBars\n"
        "with ProgressBars() as bars:\n"
        "    bars('prefill', 1, 2)\n"
        "    with bars.busy('loading'): pass\n"
        "    bars.stop()\n"
        "say_json({'a': 1})"
    )
    terminal, program = os.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    command = [sys.executable, "-c", code]
    on_terminal = subprocess.run(command, stdout=subprocess.PIPE, stderr=program, env=environment, check=True)
    os.close(program)
    assert b"reading passages" in os.read(terminal, 100_000)
    os.close(terminal)
    assert on_terminal.stdout == b'{"a": 1}\n'
    piped = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert piped.stderr == b""
    assert piped.stdout == b'{"a": 1}\n'


@pytest.mark.slow
@pytest.mark.embedded
def test_the_embedded_model_answers_from_a_folder(corpus: Path, private_cache: Path) -> None:
    entry_point = [sys.executable, "-c", "from finch_rag.cli import main; main()"]
    args = ["ask", QUESTION, "--corpus", str(corpus), "--max-new-tokens", "16", "--json"]
    done = subprocess.run([*entry_point, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    shown = json.loads(line)
    assert "Kessler" in shown["answer"]
    assert shown["citations"][0]["passage_id"] == LIGHTHOUSE
    assert shown["report"]["model"] == "SmolLM2-135M-Instruct"
    noise = [line for line in done.stderr.splitlines() if not line.startswith("Note: ")]
    assert noise == []  # neither progress nor warnings of a library
