"""Cleaning: every filter and both kinds of duplicates, counted; the same result however the work is done."""

import hashlib
import json
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import clean as clean_module
from data_tools import cli, duplicates, plan
from data_tools.clean import CleanOptions, CleanWork, KeyWork, Waiting, clean_corpus
from data_tools.filters import FilterOptions, Filters, repeated_share
from data_tools.readers import documents
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import hash_file
from infini_train.data.words import symbol_share, words

WORDS = ["".join(random.Random(i).choices("abcdefghij", k=2 + i % 6)) for i in range(500)]


def prose(seed: int, words: int = 300) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(folder: Path, texts: list[str], name: str = "c.jsonl") -> str:
    rows = [{"id": f"{name}{i}", "text": text, "title": f"T{i}"} for i, text in enumerate(texts)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def clean(source: str, out: Path, **options):
    filters = {name: options.pop(name) for name in list(options) if name in FilterOptions.__dataclass_fields__}
    return clean_corpus([source], out, CleanOptions(filters=FilterOptions(**filters), **options))


@pytest.fixture
def small_tasks(monkeypatch) -> None:
    monkeypatch.setattr(plan, "_MIN_TASK_BYTES", 20_000)


def test_each_step_is_counted(tmp_path) -> None:
    texts = ["gru\u0308n und mehr", "a\x00b\r\nc\td fine", "short", "x" * 50, "!?!?!? ## a", "ab\nab\nab\nab\nab cd"]
    report = clean(
        write(tmp_path, [*texts, ""]),
        tmp_path / "out",
        nfc=True,
        strip_controls=True,
        min_chars=6,
        max_chars=40,
        max_symbols=0.5,
        max_repeated_lines=0.4,
    )
    found = list(documents([tmp_path / "out"]))
    assert [d.text for d in found] == ["grün und mehr", "ab\nc\td fine"]
    assert found[0].id == "c.jsonl0" and found[0].metadata == {"title": "T0"}
    assert report.changed == {"NFC": 1, "control characters": 1}
    assert report.left_out.documents == {
        "too short documents": 1,
        "too long documents": 1,
        "documents of too many symbols": 1,
        "documents of too many repeated lines": 1,
        "empty documents": 1,
    }
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (stored["documents"], stored["left_out"]["documents"]) == (2, dict(report.left_out.documents))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "out"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("end\x0cBegin old\rmac a\x0bb c\x85d", "end\nBegin old\nmac a\nb c\nd"),
        ("one\r\ntwo\u2028three\u2029four\x1ffive\x1esix", "one\ntwo\nthree\nfour five\nsix"),
        ("\x00a\x1b[1mb\x7f\x9b\tc\n", "a[1mb\tc\n"),
    ],
)
def test_control_characters_that_separate_leave_a_line_end_or_space(text, kept) -> None:
    assert Filters(FilterOptions(strip_controls=True)).change(text) == kept
    assert kept.split() == Filters(FilterOptions(strip_controls=True)).change(kept).split()


def test_a_text_of_control_characters_alone_is_empty(tmp_path) -> None:
    report = clean(write(tmp_path, ["\x00\x01", "text"]), tmp_path / "out", strip_controls=True)
    assert report.documents == 1 and report.left_out.documents == {"empty documents": 1}


SENTENCES = {
    "English": "A plain sentence, nothing else.",
    "decomposed French": unicodedata.normalize("NFD", "L'été, où les élèves étaient très fâchés."),
    "Hindi": "यह एक साधारण वाक्य है और इसमें कुछ भी नहीं।",
    "Tamil": "இது ஒரு எளிய வாக்கியம் மட்டுமே.",
    "Bengali": "এটি একটি সাধারণ বাক্য মাত্র।",
    "Telugu": "ఇది ఒక సాధారణ వాక్యం మాత్రమే.",
    "Malayalam": "ഇത് ഒരു ലളിതമായ വാക്യം മാത്രമാണ്.",
    "Sinhala": "මෙය සරල වාක්\u200dයයක් පමණි, වෙන කිසිවක් නැත.",
    "Burmese": "ဤသည် ရိုးရှင်းသော စာကြောင်း ဖြစ်သည်။",
    "Khmer": "នេះគឺជាប្រយោគធម្មតាមួយ\u200bប៉ុណ្ណោះ។",
    "Thai": "นี่เป็นเพียงประโยคธรรมดาหนึ่งประโยคเท่านั้น",
    "Lao": "ນີ້ແມ່ນປະໂຫຍກທຳມະດາໜຶ່ງປະໂຫຍກເທົ່ານັ້ນ",
    "Tibetan": "འདི་ནི་ཚིག་གྲུབ་ཕལ་པ་ཞིག་ཡིན།",
    "Amharic": "ይህ፡ቀላል፡ዓረፍተ፡ነገር፡ነው።",
    "pointed Hebrew": "שָׁלוֹם עוֹלָם, זֶה מִשְׁפָּט פָּשׁוּט.",
    "pointed Arabic": "هَذِهِ جُمْلَةٌ بَسِيطَةٌ، لَا غَيْرُ.",
    "Persian": "این جمله\u200cای ساده است و نمی\u200cخواهد بیش\u200cتر باشد.",
    "Chinese": "这是一个普通的句子，没有别的。",
    "Japanese": "これは普通の文です。ほかには何もありません。",
    "Vietnamese, decomposed": unicodedata.normalize("NFD", "Đây là một câu đơn giản, không có gì khác."),
}


@pytest.mark.parametrize("language", SENTENCES)
def test_plain_sentences_of_all_scripts_are_not_symbols(language) -> None:
    text = SENTENCES[language]
    assert symbol_share(text) < 0.15
    assert symbol_share(unicodedata.normalize("NFC", text)) == symbol_share(unicodedata.normalize("NFD", text))


def test_symbols_stay_symbols_whatever_joins_them() -> None:
    family, heart = "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f"
    assert symbol_share(family) == symbol_share(heart) == symbol_share("=\u0338") == 1
    assert symbol_share(f"ab {heart}{family}") == 4 / 6


def test_shares() -> None:
    assert symbol_share("ab c_1") == 0 and symbol_share("!? \n") == 1 and symbol_share("a!") == 0.5
    assert symbol_share("") == 0 == repeated_share("\n\n")
    assert repeated_share("ab\n ab \n\ncdef") == 0.25 and repeated_share("a\nb") == 0


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_the_defaults_change_nothing(text) -> None:
    filters = Filters(FilterOptions())
    assert filters.change(text) == text and filters.reason_against(text) is None and not filters.changed


def test_languages(tmp_path) -> None:
    pytest.importorskip("py3langid")
    english = "This is a plain English sentence about the weather and about nothing else at all."
    german = "Dies ist ein ganz gewöhnlicher deutscher Satz über das Wetter und sonst über nichts."
    report = clean(write(tmp_path, [english, german]), tmp_path / "out", languages=("en",))
    assert [d.text for d in documents([tmp_path / "out"])] == [english]
    assert report.left_out.documents == {"documents of other languages": 1}
    with pytest.raises(ConfigError, match="languages: xx is not known"):
        Filters(FilterOptions(languages=("en", "xx")))


@pytest.mark.parametrize("bucket_records", [4_000_000, 5])
def test_exact_duplicates_go_and_the_first_stays(tmp_path, small_tasks, monkeypatch, bucket_records) -> None:
    monkeypatch.setattr(duplicates, "_BUCKET_RECORDS", bucket_records)
    draw = random.Random(1)
    texts = [prose(draw.randrange(60), 80) for _ in range(200)]
    report = clean(write(tmp_path, texts), tmp_path / "out", dedup=True)
    assert [d.text for d in documents([tmp_path / "out"])] == list(dict.fromkeys(texts))
    assert report.left_out.documents == {"duplicates": 200 - len(set(texts))}
    assert len(list((tmp_path / "out").glob("part-*"))) > 2


def test_near_duplicates_go_and_others_stay(tmp_path, small_tasks) -> None:
    pytest.importorskip("rensa")
    texts = [prose(i) for i in range(60)]
    changed = [" ".join([*text.split()[:-2], "other", "end"]) for text in texts[:30]]
    half = [" ".join([*text.split()[:150], *prose(1000 + i, 150).split()]) for i, text in enumerate(texts[:30])]
    report = clean(write(tmp_path, [*texts, *changed, *half]), tmp_path / "out", near_dedup=0.8)
    assert [d.text for d in documents([tmp_path / "out"])] == [*texts, *half]
    assert report.left_out.documents == {"near duplicates": 30}
    keys = duplicates.NearKeys(0.8)
    assert 0.75 < (1 / keys.bands) ** (1 / keys.rows) < 0.85 and keys.bands * keys.rows <= 128
    assert duplicates.disk_bytes(keys.bands) == 32 * keys.bands


@pytest.mark.parametrize("letters", ["0x4e00 0x5fff", "0xe01 0xe2e", "0x1000 0x1020"], ids=["Han", "Thai", "Burmese"])
def test_near_duplicates_of_texts_without_spaces_are_found(tmp_path, letters) -> None:
    """Such a text was one word, so nothing but the whole text counted."""
    pytest.importorskip("rensa")
    first, last = (int(bound, 16) for bound in letters.split())
    draw = random.Random(1)
    texts = ["".join(chr(draw.randint(first, last)) for _ in range(400)) for _ in range(20)]
    changed = [text[:200] + chr(first) * 3 + text[203:] for text in texts[:10]]
    half = [text[:200] + "".join(chr(draw.randint(first, last)) for _ in range(200)) for text in texts[:10]]
    report = clean(write(tmp_path, [*texts, *changed, *half]), tmp_path / "out", near_dedup=0.8)
    assert [d.text for d in documents([tmp_path / "out"])] == [*texts, *half]
    assert report.left_out.documents == {"near duplicates": 10}


def test_signatures_of_texts_with_spaces_are_those_of_before() -> None:
    pytest.importorskip("rensa")
    signature = duplicates.NearKeys(0.8).signature(prose(1))
    assert hashlib.sha256(signature.tobytes()).hexdigest()[:16] == "6afc46382c426b4d"


def test_half_done_work_of_older_rules_is_not_gone_on_with(tmp_path, small_tasks, monkeypatch) -> None:
    source = write(tmp_path, [prose(i, 100) for i in range(200)])
    with monkeypatch.context() as patch:
        patch.setattr(clean_module, "FILTERS_VERSION", 1)
        assert clean(source, tmp_path / "out", nfc=True, part="1/2") == Waiting(for_duplicates=False)
    with pytest.raises(ConfigError, match="holds unfinished work of another command"):
        clean(source, tmp_path / "out", nfc=True, part="2/2")


def test_workers_parts_and_stopped_runs_give_the_same_bytes(tmp_path, small_tasks, monkeypatch) -> None:
    source = write(tmp_path, [prose(i % 150, 100) for i in range(200)])
    options = {"dedup": True, "nfc": True}
    clean(source, tmp_path / "one", **options)
    clean(source, tmp_path / "two", workers=2, **options)
    for work in (KeyWork, CleanWork):  # stops once in each pass
        real = work.__call__

        def stopping(self, task, *rest, real=real) -> None:
            if task == 2:
                raise KeyboardInterrupt
            real(self, task, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(work, "__call__", stopping)
            clean(source, tmp_path / "set", **options)
        assert len(list((tmp_path / ".set.partial").glob("**/task-*"))) >= 2
    clean(source, tmp_path / "set", **options)
    one = {p.name: hash_file(p) for p in (tmp_path / "one").iterdir()}
    for name in ("two", "set"):
        assert {p.name: hash_file(p) for p in (tmp_path / name).iterdir()} == one
    assert clean(source, tmp_path / "parts", nfc=True, part="1/2") == Waiting(for_duplicates=False)
    report = clean(source, tmp_path / "parts", nfc=True, part="2/2")
    assert report.documents == 200
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "one", "parts", "set", "two"]


def test_parts_find_duplicates_of_each_other(tmp_path, small_tasks) -> None:
    """Each part is called twice, but the last one to look: it goes on by itself."""
    pytest.importorskip("rensa")
    source = write(tmp_path, [prose(i % 150, 100) for i in range(200)])
    options = {"dedup": True, "near_dedup": 0.8}
    clean(source, tmp_path / "one", **options)
    calls = ["1/3", "1/3", "2/3", "3/3", "1/3"]
    found = [clean(source, tmp_path / "set", part=part, **options) for part in calls]
    looking, writing = Waiting(for_duplicates=True), Waiting(for_duplicates=False)
    assert found == [looking, looking, looking, writing, writing] and not (tmp_path / "set").exists()
    report = clean(source, tmp_path / "set", part="2/3", workers=2, **options)
    assert report.documents == 150
    one, parts = ({p.name: hash_file(p) for p in (tmp_path / name).iterdir()} for name in ("one", "set"))
    assert one == parts and len(one) > 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "one", "set"]


def test_a_part_that_comes_when_all_is_done_finds_it(tmp_path) -> None:
    source = write(tmp_path, ["one", "two"])  # a single task: nothing is left for the second part
    report = clean(source, tmp_path / "set", part="1/2")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").iterdir()}
    for part in ("2/2", "1/2"):
        assert clean(source, tmp_path / "set", part=part) == report
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").iterdir()} == before
    with pytest.raises(ConfigError, match="a cleaned corpus is there already"):
        clean(source, tmp_path / "set", part="2/2", nfc=True)
    write(tmp_path, ["one", "two", "three"])
    with pytest.raises(ConfigError, match="a cleaned corpus is there already"):
        clean(source, tmp_path / "set", part="2/2")


@pytest.mark.parametrize("slab", [1, 7, 1_000_000])
@settings(max_examples=50, deadline=None)
@given(text=st.text("ab c\n", max_size=60) | st.text("a今あ\u3099。ด\u0e34\u200b\u0f0b, \n", max_size=60))
def test_shingles_do_not_depend_on_how_a_text_is_read(slab, text) -> None:
    found = text.lower().split() if text.isascii() else words(text.lower())
    expected = [" ".join(found[i : i + 5]) for i in range(max(1, len(found) - 4))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_SLAB_CHARS", slab)
        assert [shingle for some in duplicates._shingles(text) for shingle in some] == expected


def test_refusals(tmp_path) -> None:
    source = write(tmp_path, ["text"])
    with pytest.raises(ConfigError, match="threshold: 2 is not a share"):
        clean(source, tmp_path / "out", near_dedup=2)
    with pytest.raises(ConfigError, match="max_symbols: must be a share"):
        FilterOptions(max_symbols=-1)
    with pytest.raises(ConfigError, match=r"nothing stays of the sources: left out 1 too short documents"):
        clean(source, tmp_path / "out", min_chars=10)
    with pytest.raises(ConfigError, match="is not empty and not a cleaned corpus"):
        clean(source, tmp_path)
    clean(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="a cleaned corpus is there already"):
        clean(source, tmp_path / "out")
    assert clean(source, tmp_path / "out", overwrite=True).documents == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "out"]


def test_the_command_and_fertility(tmp_path, capsys) -> None:
    source = write(tmp_path, ["grün\r\n", "", "two words"])
    assert cli.main(["clean", source, "--out", str(tmp_path / "out"), "--strip-controls"]) == 0
    shown = capsys.readouterr()
    assert "out: 2 documents, 15 bytes" in shown.out
    assert "left out 1 empty documents\nchanged 1 documents: control characters\n" in shown.err
    assert cli.main(["fertility", str(tmp_path / "out"), "--tokenizer", "byte"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["1.000", "5.000", "yes", "15", "byte,", "out"]
