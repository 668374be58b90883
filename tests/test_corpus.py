import gzip
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finch_rag import CorpusError
from finch_rag.corpus import Question, load_questions, read_corpus
from finch_rag.corpus.splitting import MAX_WORDS, count_words, markdown_sections, split_text

EXAMPLES = Path(__file__).parent.parent / "examples" / "corpus"


def ids(path: Path) -> list[str | None]:
    return [passage.id for passage in read_corpus(path).passages]


def words(count: int, word: str = "word") -> str:
    return " ".join(f"{word}{number}" for number in range(count))


def sentences(count: int) -> str:
    return " ".join(f"Sentence {number} has six words." for number in range(count))


def test_every_gold_id_of_the_example_corpus_is_a_passage_that_holds_the_answer() -> None:
    corpus = read_corpus(EXAMPLES)
    by_id = {passage.id: passage for passage in corpus.passages}
    questions = load_questions(EXAMPLES / "questions.jsonl")
    assert len(questions) == 30
    assert len(by_id) == len(corpus.passages) == 108
    assert corpus.warnings == []
    for question in questions:
        texts = [by_id[gold].text for gold in question.gold_ids]
        assert any(answer in text for answer in question.answers for text in texts), question.id


def test_markdown_sections_become_passages_with_heading_and_github_slug(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "isles.md").write_text(
        "# The Isles\n\n## Copley's Orchard & Barn!\napples\n\n### [Docs](http://x.y) here ##\nsee\n\nmore\n"
        "## Copley's Orchard & Barn!\npears\n## Ärger_1\nx\n"
    )
    passages = read_corpus(tmp_path).passages
    assert [(p.id, p.title, p.text) for p in passages] == [
        ("sub/isles.md#copleys-orchard--barn", "Copley's Orchard & Barn!", "apples"),
        ("sub/isles.md#docs-here", "Docs here", "see\n\nmore"),
        ("sub/isles.md#copleys-orchard--barn-1", "Copley's Orchard & Barn!", "pears"),
        ("sub/isles.md#ärger_1", "Ärger_1", "x"),
    ]


def test_text_before_the_first_heading_is_a_passage(tmp_path: Path) -> None:
    file = tmp_path / "notes.md"
    file.write_text("opening\n# First\nbody")
    assert [(p.id, p.title, p.text) for p in read_corpus(file).passages] == [
        ("notes.md", "notes", "opening"),
        ("notes.md#first", "First", "body"),
    ]


@pytest.mark.parametrize("fence", ["```", "~~~~", "  ```python"])
def test_a_comment_in_a_fenced_code_block_is_no_heading(fence: str) -> None:
    closing = fence.strip(" python")
    (section,) = markdown_sections(f"# A\n{fence}\n# no\n``\n{closing}\nbehind")
    assert section.text.startswith(fence)
    assert section.text.endswith("behind")
    assert "# no" in section.text
    assert [s.heading for s in markdown_sections(f"# A\n{fence}\nx\n{closing}\n# B\ny")] == ["A", "B"]


def test_a_fence_that_is_never_closed_hides_headings_to_the_end() -> None:
    assert [(s.heading, s.text) for s in markdown_sections("# A\n```\n# b\n")] == [("A", "```\n# b")]


def test_hashes_that_are_no_headings_stay_text() -> None:
    (section,) = markdown_sections("# A\n#hashtag\n####### seven\n    # indented code")
    assert section.text == "#hashtag\n####### seven\n    # indented code"


def test_slugs_stay_unique_when_a_heading_looks_like_a_numbered_one() -> None:
    sections = markdown_sections("# a\n1\n# a\n2\n# a-1\n3\n# a\n4")
    assert [section.slug for section in sections] == ["a", "a-1", "a-1-1", "a-2"]


def test_long_sections_are_cut_and_their_parts_have_ids(tmp_path: Path) -> None:
    file = tmp_path / "long.md"
    file.write_text(f"# Long\n{words(100)}\n\n{words(100)}\n\n{words(40)}\n# Long part2\nshort")
    passages = read_corpus(file).passages
    assert [p.id for p in passages] == ["long.md#long", "long.md#long.part2", "long.md#long-part2"]
    assert [p.title for p in passages] == ["Long", "Long", "Long part2"]
    assert [count_words(p.text) for p in passages] == [100, 140, 1]


def test_text_files_are_packed_by_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("\n\n".join([words(60), words(60), words(60), words(60), words(60)]))
    passages = read_corpus(tmp_path).passages
    assert [p.id for p in passages] == ["letters.txt#1", "letters.txt#2", "letters.txt#3"]
    assert {p.title for p in passages} == {"letters"}
    assert [count_words(p.text) for p in passages] == [120, 120, 60]


def test_a_long_paragraph_is_cut_between_sentences() -> None:
    pieces = split_text(sentences(60))  # 5 words each
    assert [count_words(piece) for piece in pieces] == [160, 140]
    assert all(piece.startswith("Sentence") and piece.endswith("words.") for piece in pieces)


def test_abbreviations_before_small_letters_are_no_border() -> None:
    text = f"It grows, e.g. here, {words(6)}. Then it stops."
    assert split_text(text, 12)[0].endswith("word5.")


def test_chinese_counts_by_character_and_is_cut_at_its_full_stops() -> None:
    pieces = split_text("他在那里住了很多年。" * 40)
    assert all(count_words(piece) <= MAX_WORDS for piece in pieces)
    assert all(piece.endswith("。") for piece in pieces)


texts = st.text(st.sampled_from("ab.!? \n\t#漢。é"), max_size=400) | st.text(max_size=200)


@given(texts, st.integers(1, 12))
@example("a漢a", 1)
@example("x" * 500, 1)
def test_splitting_loses_nothing_and_keeps_the_limit(text: str, limit: int) -> None:
    pieces = split_text(text, limit)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(piece == piece.strip() and piece for piece in pieces)
    assert all(count_words(piece) <= limit for piece in pieces)


@given(texts, st.integers(1, 12))
def test_splitting_packs_tightly(text: str, limit: int) -> None:
    if count_words(text) <= limit:
        assert split_text(text, limit) == [text.strip()] * bool(text.strip())


def test_json_lines_are_passages_and_are_not_split(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    long = words(500)
    lines = [{"id": "a", "title": "A", "text": long}, {"text": "b"}, {"id": 7, "title": None, "text": "c\u2028d"}]
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    passages = read_corpus(file).passages
    assert [(p.id, p.title, p.text) for p in passages] == [
        ("a", "A", long),
        ("p.jsonl#2", None, "b"),
        ("7", None, "c\u2028d"),
    ]


def test_compressed_files_read_like_plain_ones(tmp_path: Path) -> None:
    for name, content in (("a.md", "# H\nx"), ("b.txt", "y"), ("c.jsonl", '{"text": "z"}')):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    passages = read_corpus(tmp_path).passages
    assert [(p.id, p.title, p.text) for p in passages] == [
        ("a.md.gz#h", "H", "x"),
        ("b.txt.gz#1", "b", "y"),
        ("c.jsonl.gz#1", None, "z"),
    ]


def test_a_folder_is_read_in_order_without_questions_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("b/z.txt", "a.txt", "b/a.txt", ".git/x.txt", ".y.txt", "n.pdf", "questions.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "b" / "questions.dev.jsonl").write_text("no passages")
    (tmp_path / "questions.jsonl.gz").write_bytes(b"no passages")
    assert ids(tmp_path) == ["a.txt#1", "b/a.txt#1", "b/z.txt#1", "questions.md"]


def test_line_ends_and_byte_order_mark_do_not_reach_the_passages(tmp_path: Path) -> None:
    file = tmp_path / "dos.md"
    file.write_bytes(b"\xef\xbb\xbf# Head\r\nbody\r\nmore")
    assert [(p.title, p.text) for p in read_corpus(file).passages] == [("Head", "body\nmore")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.txt", "Größe".encode("latin-1"), "not UTF-8 (byte 2)"),
        ("bad.txt.gz", b"not gzip", "cannot be decompressed"),
        ("bad.md.gz", gzip.compress(b"text", mtime=0)[:-5], "cannot be decompressed"),
        ("bad.md", b"# Only\n## Headings\n", "no text"),
    ],
)
def test_an_unreadable_file_is_named_and_left_out(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match="no text") as error:
        read_corpus(tmp_path)
    assert reason in str(error.value)
    assert name in str(error.value)

    (tmp_path / "good.txt").write_text("text")
    corpus = read_corpus(tmp_path)
    assert [p.id for p in corpus.passages] == ["good.txt#1"]
    (warning,) = corpus.warnings
    assert name in warning
    assert reason in warning


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "b.txt").chmod(0)
    assert "b.txt" in read_corpus(tmp_path).warnings[0]


def test_a_missing_corpus(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere does not exist: .*\.txt, \.md and \.jsonl"):
        read_corpus(tmp_path / "nowhere")


def test_a_folder_without_files_to_read(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(CorpusError, match=r"no files that can be read; .*\.txt, \.md and \.jsonl"):
        read_corpus(tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(CorpusError, match=r"a\.pdf .*\.txt, \.md and \.jsonl"):
        read_corpus(tmp_path / "a.pdf")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "JSON list"),
        ('{"title": "t"}', 'no text in "text"'),
        ('{"text": "  "}', 'no text in "text"'),
        ('{"text": 3}', 'no text in "text"'),
        ('{"text": "a", "title": 3}', '"title" is int'),
        ('{"text": "a", "id": []}', '"id" is list'),
        ('{"text": "\\ud800"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "fine"}\n\n' + line)
    with pytest.raises(CorpusError) as error:
        read_corpus(tmp_path)
    assert str(error.value).startswith("p.jsonl, line 3")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_questions_with_one_or_more_gold_passages(tmp_path: Path) -> None:
    lines = [
        {"id": "q1", "question": "Who?", "answers": ["Ada", "A."], "gold_id": "a#b"},
        {"question": "When?", "answers": ["1903"], "gold_ids": ["c", "d"]},
    ]
    content = "\n".join(map(json.dumps, lines))
    plain, compressed = tmp_path / "q.jsonl", tmp_path / "q.jsonl.gz"
    plain.write_text(content)
    compressed.write_bytes(gzip.compress(content.encode()))
    assert load_questions(plain) == [
        Question("q1", "Who?", ("Ada", "A."), ("a#b",)),
        Question("q.jsonl#2", "When?", ("1903",), ("c", "d")),
    ]
    assert load_questions(str(compressed))[0].answers == ("Ada", "A.")


def test_questions_without_an_answer_and_sentences_that_support_one(tmp_path: Path) -> None:
    lines = [
        {"id": "a", "question": "Who?", "answers": [], "gold_ids": ["p"], "answerable": False},
        {"id": "b", "question": "When?", "answerable": False},
        {"id": "c", "question": "Why?", "answers": ["It was."], "gold_id": "p", "sentences": [["It .", "was ."], []]},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert load_questions(file) == [
        Question("a", "Who?", (), ("p",), answerable=False),
        Question("b", "When?", (), (), answerable=False),
        Question("c", "Why?", ("It was.",), ("p",), sentences=(("It .", "was ."),)),  # who marked nothing is left out
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"question": "Who?", "answers": "Ada", "gold_id": "a"}', 'line 1: "answers" must be a list'),
        ('{"question": "Who?", "answers": [], "gold_id": "a"}', 'line 1: "answers" must be a list'),
        ('{"question": "Who?", "answers": ["Ada"]}', 'line 1 has no text in "gold_id"'),
        ('{"question": "Who?", "answers": ["Ada"], "gold_ids": []}', 'line 1: "gold_ids" must be a list'),
        ('{"question": "Who?", "gold_ids": ["a"], "answerable": "no"}', 'line 1: "answerable" is str, not true or'),
        ('{"question": "Who?", "answers": "x", "answerable": false}', 'line 1: "answers" must be a list of texts'),
        (
            '{"question": "Who?", "answers": ["Ada"], "gold_id": "a", "sentences": "x"}',
            'line 1: "sentences" must be a list of lists',
        ),
        (
            '{"question": "Who?", "answers": ["Ada"], "gold_id": "a", "sentences": ["x"]}',
            'line 1: "sentences" must be a list of texts',
        ),
        ('{"question": "Who?", "answers": ["Ada"], "gold_ids": "a"}', 'line 1: "gold_ids" must be a list'),
        ('{"answers": ["Ada"], "gold_id": "a"}', 'line 1 has no text in "question"'),
        ("", "no questions"),
    ],
)
def test_bad_questions(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(content)
    with pytest.raises(CorpusError) as error:
        load_questions(file)
    assert reason in str(error.value)


def test_missing_and_damaged_questions(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="do not exist"):
        load_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl.gz").write_bytes(b"no")
    with pytest.raises(CorpusError, match="cannot be decompressed"):
        load_questions(tmp_path / "q.jsonl.gz")


@pytest.mark.parametrize("line", ["# a" + " " * 200_000 + "b", "# " + "#" * 200_000 + "b", "# " + "[" * 200_000])
def test_a_long_heading_takes_linear_time(line: str) -> None:
    started = time.process_time()
    (section,) = markdown_sections(f"{line}\ntext")
    assert section.text == "text"
    assert time.process_time() - started < 2
